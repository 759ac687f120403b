from typing import overload

import numpy as np
from numpy.typing import NDArray

def kernels_version() -> int: ...
def mask_count(mask: NDArray[np.uint8]) -> int: ...
def target_name() -> str: ...
def target_reason() -> str: ...
def targets() -> list[str]: ...
def set_target(name: str) -> None: ...

class Tensor:
    @overload
    def __init__(
        self,
        layout: int,
        value_type: int,
        rows: int,
        columns: int,
        scale_type: int,
        n: int,
        m: int,
        position_bits: int,
        group_size: int,
        positions: NDArray[np.uint8],
        values: NDArray[np.uint8],
        scale: NDArray[np.uint8],
        table: NDArray[np.uint8],
    ) -> None: ...
    @overload
    def __init__(self, blob: NDArray[np.uint8]) -> None: ...
    @property
    def kept(self) -> int: ...
    def matmul(self, x: NDArray[np.float32], step: int = ...) -> NDArray[np.float32]: ...
