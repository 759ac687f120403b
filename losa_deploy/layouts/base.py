"""What every packed layout shares: the packed tensor, the packing options, the registry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from losa_deploy.layouts.values.base import ValueType

FORMAT_VERSION = 1
"""Version of `docs/formats.md` that these layouts follow; a change of stored bytes needs a new one."""
Component = NDArray[np.generic]
"""One stored array of a packed tensor; its dtype and bytes are part of the format."""

COMPONENTS = ("positions", "values", "scale", "table")
"""Every component a layout can store, in the order in which they are stored and hashed."""


@dataclass(frozen=True)
class PackOptions:
    """How values are stored, independent of where they are."""

    value_type: str = "i8"
    """A name in `VALUE_TYPES`."""
    group_size: int = 128
    """Grouped types only: positions (not kept values) per scale; 32, 64 or 128."""
    scale_type: Literal["f32", "f16"] = "f32"
    """i8 only: dtype of the row scales. Group scales are always f16."""
    table: tuple[int, ...] | None = None
    """Grouped types only: the level of each code, level 0 at code 0; None: as in two's complement."""
    scales: Component | None = field(default=None, compare=False)
    """[out, groups] f16: the scales of a grid that the weight is on; None to find them."""
    search: bool = False
    """Grouped types without `scales`: the best of some scales up to that of the largest weight, by error."""
    pattern: tuple[int, int] | None = None
    """(N, M) for the layouts nm and tiled: N kept of every M positions along the input dimension."""
    rows_per_mask: int = 1
    """2 for the layout bitmask: rows 2 i and 2 i + 1 have one mask, which is stored once."""


@dataclass(frozen=True)
class PackedTensor:
    """One linear as stored: parameters and components, in an order fixed by the layout."""

    layout: str
    value_type: str
    """Names in `LAYOUTS` and `VALUE_TYPES`."""
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


Shapes = Mapping[str, tuple[int, ...] | None]
"""Component → shape; None for a stream of values, whose length only the positions say."""


@dataclass(frozen=True)
class Layout:
    """A layout: pure functions only."""

    name: str
    number: int
    """In the header of a blob."""
    forms: tuple[str, ...]
    """First parts of the names of its ONNX operators; forms differ in what their bytes mean."""
    pack: Pack
    unpack: Callable[[PackedTensor], Unpacked]
    sizes: Callable[[NDArray[np.bool_], PackOptions], Mapping[str, int]]
    """Component → bytes that `pack` would store for this mask, without packing."""
    known: Callable[[tuple[int, int], ValueType, Mapping[str, int]], bool]
    """Whether a tensor (out, in) of a value type can have these parameters: n, m and position_bits."""
    shapes: Callable[[tuple[int, int], ValueType, Mapping[str, int]], Shapes]
    """Of the positions, values and scale of a known tensor (out, in)."""
    check: Callable[[PackedTensor], int]
    """Kept weights of a tensor whose components have these shapes; `ValueError` for wrong positions."""
    form: Callable[[PackedTensor], str]
    """Which of `forms` a tensor has."""
    unpadded: Callable[[PackedTensor], bool]
    """True if rows decode to `in` positions, so that there is nothing to cut off."""
    tolerates: Callable[[NDArray[np.bool_], PackOptions], bool] = field(default=lambda mask, options: True)
    """Whether this mask can be stored at all."""
    stores: Callable[[ValueType], bool] = field(default=lambda kind: True)
    """Whether values of this type can be stored."""
    parameters: tuple[str, ...] = ()
    """What a packed tensor has beside those of its value type."""
    rows_together: int = 1
    """Rows that each entry of the first dimension of positions and values holds."""

    def size(self, mask: NDArray[np.bool_], options: PackOptions) -> int:
        """Bytes of all components that `pack` would store for this mask."""
        return sum(self.sizes(mask, options).values())


LAYOUTS: dict[str, Layout] = {}
"""Every layout by name; filled where each is defined."""


def register(layout: Layout) -> Layout:
    """Add a layout to `LAYOUTS`; called once at the end of the file that defines it."""
    LAYOUTS[layout.name] = layout
    return layout
