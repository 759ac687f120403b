from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

def kernels_version() -> int: ...
def mask_count(mask: NDArray[np.uint8]) -> int: ...
def target_name() -> str: ...
def target_reason() -> str: ...
def targets() -> list[str]: ...
def set_target(name: str) -> None: ...
def find_kept(value_type: int, codes: NDArray[np.uint8]) -> NDArray[np.uint64]: ...
def choose(
    words: NDArray[np.uint64], rows: int, columns: int, value_type: int, terms: str
) -> tuple[int, int, int]: ...
def pack(
    layout: int,
    value_type: int,
    rows: int,
    columns: int,
    group_size: int,
    n: int,
    m: int,
    codes: NDArray[np.uint8],
    words: NDArray[np.uint64],
    scales: NDArray[np.uint16],
    ranges: int = ...,
) -> dict[str, NDArray[np.uint8]]: ...
def round_rows(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    width: int,
    low: float,
    high: float,
    result: NDArray[np.float32] | NDArray[np.uint16],
) -> None: ...
def round_gradient(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    width: int,
    low: float,
    high: float,
    gradient: NDArray[np.float32] | NDArray[np.uint16],
    weight_gradient: NDArray[np.float32],
    scale_gradient: NDArray[np.float32],
) -> None: ...
def read_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...

class MatmulTimer:
    def __init__(self, tensors: Sequence[Mapping[str, int | NDArray[np.uint8]]]) -> None: ...
    def time(self, tokens: int, threads: int, passes: int, rows: int = 0) -> list[float]: ...

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
    def matmul(self, x: NDArray[np.float32], step: int = ..., threads: int = ...) -> NDArray[np.float32]: ...
