"""Random packed tensors of any size, made quickly: a few rows are packed, and their bytes repeated.

No kernel and no runtime is faster or slower for rows that come again some hundred rows later, so a
repeated tensor costs what a fully random one does, and a table of 45 million weights takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackedTensor, PackOptions, bitmask, tiled
from losa_deploy.layouts.base import Component
from losa_deploy.layouts.blob import header_numbers, scale_type_id
from losa_deploy.layouts.sliding import STRIDE, WINDOW
from losa_deploy.layouts.steps import TILE
from losa_deploy.layouts.streams import stream_bytes, used_bytes
from losa_deploy.structure import Structure, window_starts

SEED_ROWS = 256
"""At most so many different rows per tensor."""
MOST_DENOMINATOR = 10_000
"""A stride has at most four decimals (`structure.parse_structure`)."""


@dataclass(frozen=True)
class Pruning:
    """Which random weights are zero."""

    sparsity: float
    pattern: tuple[int, int] | None = None
    """(N, M); then the sparsity is 1 - N/M."""
    seed: int = 0
    stride: float = 0.0
    """Sliding windows instead of a pattern or a sparsity; 0: none."""
    paired: bool = False
    """Rows 2 i and 2 i + 1 have one mask."""

    def weight(self, shape: tuple[int, int], seed: int | None = None) -> RandomWeight:
        """One [out, in], of another seed than this one where it is given."""
        seed = self.seed if seed is None else seed
        return RandomWeight(shape, self.sparsity, self.pattern, seed, self.stride, self.paired)


@dataclass(frozen=True)
class Storage:
    """How a weight is stored."""

    layout: str
    """dense, bitmask, nm, tiled or sliding."""
    value_type: str
    sparsity: float = 0.0
    """Fraction of zeros; with a pattern it is 1 - N/M."""
    pattern: tuple[int, int] | None = None
    """(N, M); nm and tiled only."""
    group_size: int = 128
    """i4 only: positions per scale."""
    stride: float = 0.0
    """Of sliding windows, where the mask has some; then the sparsity is 1 - 1/stride."""
    paired: bool = False
    """Rows 2 i and 2 i + 1 have one mask."""

    @property
    def label(self) -> str:
        """E.g. `bitmask 60 % i4`, `bitmask sliding:2.5 i4` or `nm 2:4 i8`."""
        if self.layout in ("dense", "sliding"):
            return f"{self.layout} {self.value_type}"
        where = f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{100 * self.sparsity:g} %"
        if self.stride:
            where = f"sliding:{self.stride:g}"
        return f"{self.layout} {'pair ' if self.paired else ''}{where} {self.value_type}"

    def pruning(self, seed: int = 0) -> Pruning:
        """A mask that it stores."""
        stride = STRIDE if self.layout == "sliding" else self.stride
        return Pruning(self.sparsity, self.pattern, seed, stride, self.paired)

    @property
    def options(self) -> PackOptions:
        pattern = None if self.layout == "tiled" else self.pattern
        shared = self.paired and self.layout == "bitmask" and bitmask.can_share(VALUE_TYPES[self.value_type])
        return PackOptions(
            self.value_type, self.group_size, pattern=pattern, rows_per_mask=bitmask.PAIR if shared else 1
        )


def layout_of_pattern(pattern: tuple[int, int] | None, value_type: str) -> str:
    """What `auto` stores a pattern of random weights as: in tiles if it has some, smaller than dense."""
    if pattern is None:
        return "bitmask"
    n, m = pattern
    kind = VALUE_TYPES[value_type]
    if not (tiled.known_pattern(n, m) and tiled.holds(kind, m)):
        return "nm"
    return "tiled" if m == tiled.SHORT or tiled.saves(kind, n) else "nm"


def layout_of_structure(structure: Structure, value_type: str) -> str:
    """What `auto` stores random weights as whose mask is one of `--pattern`."""
    if structure.stride == STRIDE and LAYOUTS["sliding"].stores(VALUE_TYPES[value_type]):
        return "sliding"
    pattern = (structure.kept, structure.group) if structure.group else None
    return layout_of_pattern(pattern, value_type)


@dataclass(frozen=True)
class RandomWeight:
    """A pruned random weight [out, in] whose rows repeat after `period` rows; zeros are exactly zero."""

    shape: tuple[int, int]
    sparsity: float
    pattern: tuple[int, int] | None = None
    seed: int = 0
    stride: float = 0.0
    paired: bool = False
    """As in `Pruning`."""

    @property
    def period(self) -> int:
        """Different rows: the largest divisor of `out` up to `SEED_ROWS` that is a multiple of 16, or even.

        i4 stores pairs of rows, and tiles have 16.
        """
        rows = self.shape[0]
        for step in (TILE, 2):
            for n in range(SEED_ROWS, 1, -step):
                if rows % n == 0:
                    return n
        return rows

    @property
    def repeats(self) -> int:
        """How often these rows come."""
        return self.shape[0] // self.period

    @cached_property
    def rows(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Weight and mask [period, in]; outputs have about the size of the inputs."""
        rng = np.random.default_rng(self.seed)
        shape = (self.period, self.shape[1])
        weight = rng.standard_normal(shape, np.float32) * np.float32(1 / np.sqrt(self.shape[1]))
        mask = self._mask(rng, shape)
        return np.where(mask, weight, np.float32(0)), mask

    def matrix(self) -> NDArray[np.float32]:
        """The whole weight [out, in]."""
        return np.tile(self.rows[0], (self.repeats, 1))

    def pack(self, storage: Storage) -> PackedTensor:
        """Stored as a packed tensor."""
        weight, mask = self.rows
        packed = LAYOUTS[storage.layout].pack(weight, mask, storage.options)
        return repeat_rows(packed, mask, self.repeats)

    def _mask(self, rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.bool_]:
        if self.paired:
            half = replace(self, paired=False)._mask(rng, (-(-shape[0] // 2), shape[1]))
            return np.repeat(half, 2, axis=0)[: shape[0]]
        if self.stride:
            return sliding_mask(rng, shape, self.stride)
        if self.pattern is None:
            return rng.random(shape, np.float32) >= self.sparsity
        n, m = self.pattern
        width = -(-shape[1] // m) * m
        order = rng.random((shape[0], width // m, m), np.float32).argsort(axis=2)
        return np.ascontiguousarray((order < n).reshape(shape[0], width)[:, : shape[1]])


def random_packed(shape: tuple[int, int], storage: Storage, seed: int = 0) -> PackedTensor:
    """A random weight [out, in] stored as `storage` says."""
    return storage.pruning(seed).weight(shape).pack(storage)


def sliding_mask(
    rng: np.random.Generator, shape: tuple[int, int], stride: float = STRIDE
) -> NDArray[np.bool_]:
    """A random mask [out, in] of sliding windows.

    Every slot takes any place of its window that the slot before leaves to it, if there is one.
    """
    rows, columns = shape
    mask = np.zeros(shape, np.bool_)
    last = np.full(rows, -1)
    for start in window_starts(columns, Fraction(stride).limit_denominator(MOST_DENOMINATOR)):
        first = np.maximum(last + 1, start)
        end = min(start + WINDOW, columns)
        taken = rng.integers(first, np.maximum(end, first + 1))
        left = np.flatnonzero(taken < end)
        mask[left, taken[left]] = True
        last = np.where(taken < end, taken, last)
    return mask


def repeat_rows(packed: PackedTensor, mask: NDArray[np.bool_], times: int) -> PackedTensor:
    """What packing `times` copies of the rows below each other gives; `mask` is the one of `packed`.

    An odd number of rows can be repeated in every value type but i4, unless rows share masks.
    """
    if times == 1:
        return packed
    shared = packed.params.get("rows_per_mask", 1)
    if packed.shape[0] % 2 and packed.layout != "dense" and (packed.value_type == "i4" or shared > 1):
        raise ValueError("rows are stored in pairs, so only an even number of rows can be repeated")
    arrays: dict[str, Component] = {}
    for name, array in packed.arrays.items():
        if name == "table":
            arrays[name] = array
        elif name == "values" and packed.layout in ("bitmask", "nm"):
            arrays[name] = _repeat_stream(packed, _counts(packed, mask), times)
        else:
            arrays[name] = np.tile(array, (times,) + (1,) * (array.ndim - 1))
    shape = (packed.shape[0] * times, packed.shape[1])
    return replace(packed, shape=shape, arrays=arrays, nnz=packed.nnz * times)


def native_description(packed: PackedTensor) -> dict[str, int | NDArray[np.uint8]]:
    """What `losa_deploy._native.MatmulTimer` takes: parameters, and the bytes of each component."""
    keys = ("n", "m", "position_bits", "group_size")
    numbers = dict(zip(keys, header_numbers(packed.params), strict=True))
    return {
        "rows": packed.shape[0],
        "columns": packed.shape[1],
        "layout": LAYOUTS[packed.layout].number,
        "value_type": VALUE_TYPES[packed.value_type].number,
        "scale_type": scale_type_id(packed),
        **numbers,
        **{name: byte_view(array) for name, array in packed.arrays.items()},
    }


def byte_view(array: Component) -> NDArray[np.uint8]:
    """The bytes of an array, flat, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _counts(packed: PackedTensor, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Stored values per row [out], those beyond the end of an N:M row included."""
    if packed.layout == "nm":
        groups = -(-packed.shape[1] // packed.params["m"])
        return np.full(packed.shape[0], groups * packed.params["n"], np.int64)
    counts: NDArray[np.int64] = np.count_nonzero(mask, axis=1)
    return counts


def _repeat_stream(packed: PackedTensor, counts: NDArray[np.int64], times: int) -> Component:
    """The stream without its padding, `times` times, and padded again."""
    values, kind = packed.arrays["values"], VALUE_TYPES[packed.value_type]
    paired = packed.params.get("rows_per_mask", 1) > 1
    used = used_bytes(counts, kind, paired=paired) // values.itemsize
    length = stream_bytes(np.tile(counts, times), kind, paired=paired) // values.itemsize
    repeated = np.zeros(length, values.dtype)
    repeated[: used * times] = np.tile(values[:used], times)
    return repeated
