"""What every packed layout shares: the packed tensor, the packing options, the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
"""Version of `docs/formats.md` that these layouts follow; a change of stored bytes needs a new one."""
ValueType = Literal["f32", "f16", "i8", "i4"]
Component = NDArray[np.generic]
"""One stored array of a packed tensor; its dtype and bytes are part of the format."""

COMPONENTS = ("positions", "values", "scale", "table")
"""Every component a layout can store, in the order in which they are stored and hashed."""


@dataclass(frozen=True)
class PackOptions:
    """How values are stored, independent of where they are."""

    value_type: ValueType = "i8"
    group_size: int = 128
    """i4 only: positions (not kept values) per scale; 32, 64 or 128."""
    scale_type: Literal["f32", "f16"] = "f32"
    """i8 only: dtype of the row scales. Group scales are always f16."""
    table: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
    """i4 only: the level of each of the 16 codes; level 0 must be at code 0."""
    scales: Component | None = field(default=None, compare=False)
    """[out, groups] f16: the scales of a grid that the weight is on; None to find them."""
    search: bool = False
    """i4 without `scales`: each group tries smaller scales than that of its largest weight, by error."""
    pattern: tuple[int, int] | None = None
    """(N, M) for the layouts nm and tiled: N kept of every M positions along the input dimension."""


@dataclass(frozen=True)
class PackedTensor:
    """One linear as stored: parameters and components, in an order fixed by the layout."""

    layout: str
    value_type: ValueType
    shape: tuple[int, int]
    """(out, in)."""
    params: Mapping[str, int]
    arrays: Mapping[str, Component]
    """Component name → array, in the order of `COMPONENTS`."""
    nnz: int
    """Kept weights, that is ones in the mask; a kept weight may be zero."""

    def __post_init__(self) -> None:
        if [name for name in COMPONENTS if name in self.arrays] != list(self.arrays):
            raise ValueError(f"components {list(self.arrays)} are not in the order {COMPONENTS}")

    @property
    def nbytes(self) -> int:
        """Stored bytes of all components."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per position of the dense matrix."""
        return 8.0 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    @property
    def sha256(self) -> str:
        """Over the bytes of the components, one after another."""
        digest = hashlib.sha256()
        for array in self.arrays.values():
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Unpacked:
    """What a packed tensor means."""

    weight: NDArray[np.float32]
    """[out, in]; exactly +0 outside the mask."""
    mask: NDArray[np.bool_]
    """[out, in]; True = kept. All True for the dense layout, which stores no mask."""


class Pack(Protocol):
    """Weight [out, in] f32 and mask [out, in] → packed tensor."""

    def __call__(
        self, weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions
    ) -> PackedTensor: ...


@dataclass(frozen=True)
class Layout:
    """A layout: pure functions only."""

    name: str
    pack: Pack
    unpack: Callable[[PackedTensor], Unpacked]
    size: Callable[[NDArray[np.bool_], PackOptions], int]
    """Bytes `pack` would store for this mask, without packing."""
    tolerates: Callable[[NDArray[np.bool_], PackOptions], bool] = field(default=lambda mask, options: True)
    """Whether this mask can be stored at all."""


LAYOUTS: dict[str, Layout] = {}
"""Every layout by name; filled where each is defined."""


def register(layout: Layout) -> Layout:
    """Add a layout to `LAYOUTS`; called once at the end of the file that defines it."""
    LAYOUTS[layout.name] = layout
    return layout
