"""Weights packed in C++, as they are when a model is loaded: the same bytes as NumPy packs them into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, bitmask, sliding
from losa_deploy.layouts.base import COMPONENTS
from losa_deploy.layouts.values import quantize

LAYOUT_NUMBERS = {"dense": 0, "bitmask": 1, "nm": 2, "tiled": 3, "sliding": 4}
VALUE_NUMBERS = {"f32": 0, "f16": 1, "i8": 2, "i4": 3}
INTEGERS = ("i8", "i4")
SHAPES = [(1, 1), (1, 64), (1, 300), (2, 33), (3, 63), (5, 65), (7, 127), (6, 128), (7, 129), (33, 172)]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass
class Rows:
    """What both packers get: codes with their meaning, and the mask."""

    codes: NDArray[np.generic]
    """[out, in], zero outside of the mask."""
    scales: NDArray[np.float16]
    """[out, groups], [out, 1] or empty."""
    mask: Mask
    options: PackOptions

    def pack(self, layout: str, pattern: tuple[int, int] = (0, 0), ranges: int = 1) -> dict[str, Bytes]:
        """Component → bytes, from C++."""
        return _native.pack(
            LAYOUT_NUMBERS[layout],
            VALUE_NUMBERS[self.options.value_type],
            *self.mask.shape,
            self.options.group_size,
            *pattern,
            np.ascontiguousarray(self.codes).reshape(-1).view(np.uint8),
            words_of(self.mask),
            np.ascontiguousarray(self.scales).reshape(-1).view(np.uint16),
            ranges,
        )


def words_of(mask: Mask) -> NDArray[np.uint64]:
    """Mask words of all rows, one after another."""
    padded = np.zeros((len(mask), -(-mask.shape[1] // 64) * 64), np.bool_)
    padded[:, : mask.shape[1]] = mask
    return np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(np.uint64)


def options_of(value_type: str, group_size: int = 32, pattern: tuple[int, int] | None = None) -> PackOptions:
    return PackOptions(value_type, group_size, scale_type="f16", pattern=pattern)


def weight_of(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    """Of rows of different magnitudes; some values are zero, and keep their places if the mask says so."""
    rng = np.random.default_rng([*shape, seed])
    weight = rng.standard_normal(shape) * rng.uniform(0.1, 3, (shape[0], 1))
    weight[rng.random(shape) < 0.1] = 0.0
    return weight.astype(np.float32)


def rows_of(weight: NDArray[np.float32], mask: Mask, options: PackOptions) -> Rows:
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    return Rows(codes, meaning.get("scale", np.zeros(0)).astype(np.float16), mask, options)


def random_mask(shape: tuple[int, int], kept: float) -> Mask:
    """Rows that keep different numbers, one of them nothing unless all is kept."""
    mask = np.random.default_rng(shape).random(shape) < kept
    if kept < 1:
        mask[len(mask) // 2] = False
    return mask


def pattern_mask(shape: tuple[int, int], n: int, m: int) -> Mask:
    order = np.random.default_rng([*shape, n, m]).random((shape[0], shape[1] // m, m)).argsort(axis=2)
    return (order < n).reshape(shape)


def differing(found: Mapping[str, Bytes], packed: PackedTensor) -> list[str]:
    """Components that are missing, too many or other than those that NumPy packed."""
    wanted = {name: array.tobytes() for name, array in packed.arrays.items()}
    names = [name for name in COMPONENTS if name in found or name in wanted]
    return [name for name in names if name not in found or found[name].tobytes() != wanted.get(name)]


def check(layout: str, weight: NDArray[np.float32], mask: Mask, options: PackOptions) -> None:
    packed = LAYOUTS[layout].pack(weight, mask, options)
    for ranges in (1, 3):
        numbers = options.pattern or (options.rows_per_mask - 1 and options.rows_per_mask, 0)
        found = rows_of(weight, mask, options).pack(layout, numbers, ranges)
        assert differing(found, packed) == [], f"{layout} {options} {mask.shape}, {ranges} ranges"


@pytest.mark.parametrize("value_type", VALUE_NUMBERS)
@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_unstructured_masks(layout: str, value_type: str) -> None:
    for shape in SHAPES:
        for kept in (0.0, 0.4, 0.9, 1.0):
            for group_size in (32, 64, 128):
                options = options_of(value_type, group_size)
                check(layout, weight_of(shape), random_mask(shape, kept), options)


@pytest.mark.parametrize("value_type", INTEGERS)
def test_masks_of_pairs_of_rows(value_type: str, pair_mask: Callable[[int, int, int], Mask]) -> None:
    for shape in SHAPES:
        if shape[0] > 1:
            options = replace(options_of(value_type, 32), rows_per_mask=2)
            check("bitmask", weight_of(shape), pair_mask(*shape, 0), options)


@pytest.mark.parametrize("value_type", INTEGERS)
def test_rows_share_the_mask_of_what_either_of_them_keeps(value_type: str) -> None:
    """As at load, where a kept weight that is zero is missing in a mask."""
    shape = (5, 172)
    weight, options = weight_of(shape), replace(options_of(value_type, 32), rows_per_mask=2)
    found = random_mask(shape, 0.4)
    weight[~found] = 0
    packed = LAYOUTS["bitmask"].pack(weight, bitmask.share(found), options)
    assert differing(rows_of(weight, found, options).pack("bitmask", (2, 0)), packed) == []


@pytest.mark.parametrize("value_type", VALUE_NUMBERS)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (3, 4), (3, 8), (7, 12), (5, 16), (16, 32)])
def test_n_of_m(pattern: tuple[int, int], value_type: str) -> None:
    for rows in (1, 4, 7):
        for groups in (1, 3, 16, 23):
            shape = (rows, groups * pattern[1])
            check("nm", weight_of(shape), pattern_mask(shape, *pattern), options_of(value_type, 64, pattern))


@pytest.mark.parametrize("value_type", INTEGERS)
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), *((n, 16) for n in range(1, 16))])
def test_tiles(pattern: tuple[int, int], value_type: str) -> None:
    for shape in ((16, 16), (16, 64), (32, 48), (48, 208)):
        for group_size in (32, 128):
            options = options_of(value_type, group_size, pattern)
            check("tiled", weight_of(shape), pattern_mask(shape, *pattern), options)


@pytest.mark.parametrize("value_type", INTEGERS)
@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (32, 48), (16, 144), (48, 208)])
def test_sliding_windows(
    shape: tuple[int, int], value_type: str, sliding_mask: Callable[[int, int, int], Mask]
) -> None:
    weight = weight_of(shape)
    for group_size in (32, 128):
        options = options_of(value_type, group_size)
        check("sliding", weight, sliding_mask(*shape, 0), options)
        check("sliding", weight, pattern_mask(shape, 2, 4), options)


@pytest.mark.parametrize("value_type", INTEGERS)
def test_sliding_windows_that_keep_fewer(
    value_type: str, sliding_mask: Callable[[int, int, int], Mask]
) -> None:
    """A mask that is found from zeros lacks the weights that were rounded to zero."""
    for shape, kept in (((16, 16), 0.7), ((32, 208), 0.9), ((32, 208), 0.5), ((16, 64), 0.0)):
        mask, weight = sliding_mask(*shape, 1), weight_of(shape)
        mask &= np.random.default_rng(shape).random(shape) < kept
        mask[3] = False
        options, full = options_of(value_type, 32), sliding.complete(mask)
        assert full is not None
        packed = LAYOUTS["sliding"].pack(np.where(mask, weight, np.float32(0)), full, options)
        assert differing(rows_of(weight, mask, options).pack("sliding", ranges=2), packed) == []


def completed(mask: Mask, n: int, m: int) -> Mask:
    """Groups that keep fewer than N, with their lowest free positions."""
    groups = mask.reshape(len(mask), -1, m)
    missing = n - np.count_nonzero(groups, axis=2, keepdims=True)
    return (groups | (~groups & (np.cumsum(~groups, axis=2) <= missing))).reshape(mask.shape)


@pytest.mark.parametrize("value_type", INTEGERS)
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (1, 16), (5, 16), (6, 16), (15, 16)])
def test_tiles_of_groups_that_keep_fewer(pattern: tuple[int, int], value_type: str) -> None:
    """A mask that is found from zeros lacks the weights that were rounded to zero."""
    shape = (32, 208)
    mask, weight = pattern_mask(shape, *pattern), weight_of(shape)
    mask &= np.random.default_rng(pattern).random(shape) < 0.8
    mask[3] = False
    options, full = options_of(value_type, 32, pattern), completed(mask, *pattern)
    packed = LAYOUTS["tiled"].pack(np.where(mask, weight, np.float32(0)), full, options)
    rows = rows_of(weight, mask, options)
    assert differing(rows.pack("tiled", pattern, ranges=2), packed) == []
    rows.mask = full
    assert differing(rows.pack("tiled", pattern), packed) == []


@pytest.mark.parametrize("value_type", VALUE_NUMBERS)
def test_the_mask_of_codes_is_where_they_are_not_zero(value_type: str) -> None:
    for columns in (1, 7, 63, 64, 65, 128, 300):
        codes, _ = quantize(weight_of((1, columns)), options_of(value_type))
        if value_type in ("f32", "f16"):
            special = np.array([-0.0, np.nan, -np.inf, 0.0, np.finfo(codes.dtype).smallest_subnormal])
            codes[0, : min(columns, 5)] = special[:columns]
        elif value_type == "i8":
            codes[0, :1] = -128
        found = _native.find_kept(VALUE_NUMBERS[value_type], codes.reshape(-1).view(np.uint8))
        assert np.array_equal(found, words_of(codes != 0)), columns


def broken(rows: Rows, how: str) -> None:
    """One mistake that a packer could make, made in what it gets."""
    codes, mask, scales = rows.codes.copy(), rows.mask.copy(), rows.scales.copy()
    row, column = np.argwhere(mask & (codes != 0))[0]
    if how == "code":
        codes[row, column] = 0
    elif how == "bit":
        other = np.flatnonzero(~mask[row, column // 4 * 4 : column // 4 * 4 + 4])[0] + column // 4 * 4
        mask[row, [column, other]] = mask[row, [other, column]]
        codes[row, [column, other]] = codes[row, [other, column]]
    elif how == "rows":
        for array in (codes, mask):
            array[[0, 1]] = array[[1, 0]]
    elif how == "halves":
        for array in (codes, mask):
            array[[1, 9]] = array[[9, 1]]
    elif how == "scale":
        flat = scales.reshape(-1).view(np.uint16)
        flat[-1] ^= 1
    rows.codes, rows.mask, rows.scales = codes, mask, scales


@pytest.mark.parametrize(
    ("how", "component"),
    [
        ("code", "values"),
        ("bit", "positions"),
        ("rows", "values"),
        ("halves", "values"),
        ("scale", "scale"),
    ],
)
@pytest.mark.parametrize("value_type", INTEGERS)
@pytest.mark.parametrize(
    ("layout", "pattern"), [("bitmask", None), ("nm", (2, 4)), ("tiled", (2, 4)), ("sliding", None)]
)
def test_mistakes_are_noticed(
    layout: str, pattern: tuple[int, int] | None, value_type: str, how: str, component: str
) -> None:
    shape = (16, 96)
    weight, mask, options = weight_of(shape), pattern_mask(shape, 2, 4), options_of(value_type, 32, pattern)
    packed = LAYOUTS[layout].pack(weight, mask, options)
    rows = rows_of(weight, mask, options)
    assert differing(rows.pack(layout, pattern or (0, 0)), packed) == []
    broken(rows, how)
    assert component in differing(rows.pack(layout, pattern or (0, 0)), packed)


def test_every_component_is_compared() -> None:
    shape = (16, 96)
    weight, mask, options = weight_of(shape), pattern_mask(shape, 2, 4), options_of("i4", 32, (2, 4))
    packed = LAYOUTS["tiled"].pack(weight, mask, options)
    found = rows_of(weight, mask, options).pack("tiled", (2, 4))
    assert list(found) == list(packed.arrays) == list(COMPONENTS)
    for name, array in found.items():
        for at in (0, len(array) - 1):
            changed = array.copy()
            changed[at] ^= 0x10
            assert differing({**found, name: changed}, packed) == [name]
        assert differing({**found, name: array[:-1]}, packed) == [name]
        assert differing({k: v for k, v in found.items() if k != name}, packed) == [name]


@pytest.mark.parametrize(
    ("layout", "value_type", "shape", "pattern"),
    [
        ("nm", "i8", (2, 10), (2, 4)),  # a short last group
        ("nm", "i8", (2, 8), (4, 4)),
        ("nm", "i8", (2, 64), (1, 4)),  # position codes
        ("bitmask", "i8", (2, 8), (2, 4)),
        ("tiled", "f16", (16, 16), (2, 4)),
        ("tiled", "i8", (8, 16), (2, 4)),
        ("tiled", "i8", (16, 24), (2, 4)),
        ("tiled", "i8", (16, 16), (3, 4)),
        ("tiled", "i8", (16, 16), (4, 8)),
        ("tiled", "i8", (16, 16), (16, 16)),
    ],
)
def test_what_is_not_packed_in_c_is_refused(
    layout: str, value_type: str, shape: tuple[int, int], pattern: tuple[int, int]
) -> None:
    rows = rows_of(weight_of(shape), np.ones(shape, np.bool_), options_of(value_type))
    with pytest.raises(ValueError, match="not packed in this layout"):
        rows.pack(layout, pattern)
