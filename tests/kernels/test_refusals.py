"""What the loader refuses and why, on tensors whose components lie in Python's memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions

Open = Callable[[PackedTensor], object]
RandomMask = Callable[[int, int, tuple[int, int] | None, int], NDArray[np.bool_]]
Pack = Callable[[str, str, int, int], PackedTensor]
SIZE = "a component has not the bytes"
PARAMETER = "a layout, type, shape or pattern outside of the format"
PATTERN = "not N of every M"
OUTSIDE = "a position lies outside of the row"


@pytest.fixture
def pack(random_mask: RandomMask) -> Pack:
    """A function: layout (and pattern), value type, rows, columns → a sound tensor."""

    def make(layout: str, value_type: str, rows: int, columns: int) -> PackedTensor:
        name, _, words = layout.partition(" ")
        pattern = None
        if words:
            n, m = map(int, words.split(":"))
            pattern = n, m
        weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
        options = PackOptions(value_type, 32, pattern=pattern)
        return LAYOUTS[name].pack(weight, random_mask(rows, columns, pattern, 0), options)

    return make


def changed(packed: PackedTensor, name: str, array: NDArray[np.generic]) -> PackedTensor:
    return replace(packed, arrays={**packed.arrays, name: array})


def of_pattern(packed: PackedTensor, **params: int) -> PackedTensor:
    return replace(packed, params={**packed.params, **params})


def refuse(open_tensor: Open, packed: PackedTensor, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        open_tensor(packed)


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm 1:4", "nm 2:4"])
def test_truncated_components(open_tensor: Open, pack: Pack, layout: str, value_type: str) -> None:
    packed = pack(layout, value_type, 9, 64)
    open_tensor(packed)
    for name, array in packed.arrays.items():
        shorter = array[:, :-1] if array.ndim == 2 else array[:-1]
        refuse(open_tensor, changed(packed, name, shorter), SIZE)


@pytest.mark.parametrize("value_type", ["i8", "i4"])
@pytest.mark.parametrize("layout", ["tiled 5:16", "tiled 2:4"])
def test_truncated_components_of_tiles(open_tensor: Open, pack: Pack, layout: str, value_type: str) -> None:
    packed = pack(layout, value_type, 32, 64)
    open_tensor(packed)
    for name, array in packed.arrays.items():
        refuse(open_tensor, changed(packed, name, array[..., :-1]), SIZE)


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_patterns_that_tiles_cannot_have(open_tensor: Open, pack: Pack, value_type: str) -> None:
    tiles, quads = pack("tiled 5:16", value_type, 32, 64), pack("tiled 2:4", value_type, 32, 64)
    refuse(open_tensor, of_pattern(tiles, n=16), PARAMETER)
    refuse(open_tensor, of_pattern(tiles, m=8), PARAMETER)
    refuse(open_tensor, of_pattern(quads, n=3), PARAMETER)
    refuse(open_tensor, of_pattern(quads, n=1), SIZE)
    refuse(open_tensor, of_pattern(quads, m=16), SIZE)


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_positions_of_tiles_that_descend(open_tensor: Open, pack: Pack, value_type: str) -> None:
    tiles, quads = pack("tiled 5:16", value_type, 32, 64), pack("tiled 2:4", value_type, 32, 64)
    name = "values" if value_type == "i4" else "positions"
    wrong = tiles.arrays[name].copy()
    wrong[1, 2, 0, 0] = 15  # the last position comes first
    refuse(open_tensor, changed(tiles, name, wrong), PATTERN)
    wrong = quads.arrays["positions"].copy()
    wrong[1, 2, 0] = wrong[1, 2, 1] = 3  # both slots of a row at one position
    refuse(open_tensor, changed(quads, "positions", wrong), PATTERN)


def test_every_order_of_two_positions_of_a_quad_is_judged(open_tensor: Open, pack: Pack) -> None:
    packed = pack("tiled 2:4", "i8", 16, 16)
    for shift in (0, 2, 4, 6):
        for first, second in itertools.product(range(4), repeat=2):
            positions = packed.arrays["positions"].copy()
            for byte, position in ((6, first), (7, second)):
                positions[0, 0, byte] = positions[0, 0, byte] & (255 - (3 << shift)) | position << shift
            other = changed(packed, "positions", positions)
            if first < second:
                open_tensor(other)
            else:
                refuse(open_tensor, other, PATTERN)


def test_positions_ascend_within_steps_of_tiles_and_from_one_to_the_next(
    open_tensor: Open, pack: Pack
) -> None:
    packed = pack("tiled 4:16", "i4", 16, 16)
    for order in ((0, 1, 2, 3), (12, 13, 14, 15), (0, 5, 9, 15)):
        open_tensor(changed(packed, "values", with_positions(packed, order)))
    for order in (
        (3, 3, 5, 7),
        (5, 3, 6, 7),
        (3, 5, 5, 7),
        (3, 5, 4, 7),
        (3, 5, 7, 7),
        (3, 5, 9, 8),
        (8, 9, 0, 1),
    ):
        refuse(open_tensor, changed(packed, "values", with_positions(packed, order)), PATTERN)


def with_positions(packed: PackedTensor, order: tuple[int, ...]) -> NDArray[np.generic]:
    """Values of i4 tiles with other positions of the four slots of row 1."""
    values = packed.arrays["values"].copy()
    for slot, position in enumerate(order):
        step, byte = slot // 2, 4 + slot % 2
        values[0, 0, step, byte] = values[0, 0, step, byte] & 0xF0 | position
    return values


def test_bad_masks(open_tensor: Open, pack: Pack) -> None:
    packed = pack("bitmask", "i8", 9, 65)
    positions = packed.arrays["positions"].copy()
    positions[4, 15] |= np.uint8(128)
    refuse(open_tensor, changed(packed, "positions", positions), OUTSIDE)
    packed = pack("nm 2:4", "i8", 9, 64)
    positions = packed.arrays["positions"].copy()
    positions[4, 0] = np.uint8(255)
    refuse(open_tensor, changed(packed, "positions", positions), PATTERN)
