"""The choice of a layout in C++, for weights that are packed when they are loaded: as Python chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import PackOptions
from losa_deploy.layouts.choose import AT_LOAD, IN_FILE, Terms, choose

LAYOUT_NAMES = ("dense", "bitmask", "nm", "tiled", "sliding")
VALUE_TYPES = ("f32", "f16", "i8", "i4")
TERMS = {"in_file": IN_FILE, "at_load": AT_LOAD}
SHAPES = [
    (1, 1),
    (1, 40),
    (3, 7),
    (5, 65),
    (16, 16),
    (16, 48),
    (16, 80),
    (17, 64),
    (32, 96),
    (33, 172),
    (40, 192),
    (48, 256),
]
Mask = NDArray[np.bool_]
Picked = tuple[str, int, int]
"""Layout, N and M; 0 of a layout without a pattern, but for the 2 rows that may share a mask."""


def in_python(mask: Mask, value_type: str, terms: Terms) -> Picked:
    choice = choose(mask, PackOptions(value_type, scale_type="f16"), terms)
    if choice.options.rows_per_mask > 1:
        return choice.layout, choice.options.rows_per_mask, 0
    return choice.layout, *(choice.options.pattern or (0, 0))


def in_cpp(mask: Mask, value_type: str, terms: str) -> Picked:
    padded = np.zeros((len(mask), -(-mask.shape[1] // 64) * 64), np.bool_)
    padded[:, : mask.shape[1]] = mask
    words = np.packbits(padded, axis=1, bitorder="little").reshape(-1).view(np.uint64)
    layout, n, m = _native.choose(words, *mask.shape, VALUE_TYPES.index(value_type), terms)
    return LAYOUT_NAMES[layout], n, m


def grid() -> Iterator[tuple[str, Mask]]:
    """Masks by what they are."""
    for shape in SHAPES:
        rng = np.random.default_rng(shape)
        for kept in (0.0, 0.1, 0.25, 0.375, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0):
            yield f"{kept:.0%} of {shape}", rng.random(shape) < kept
        patterns = [
            (1, 2),
            (1, 4),
            (2, 4),
            (3, 4),
            (2, 8),
            (3, 8),
            (4, 8),
            (7, 8),
            (6, 12),
            (1, 32),
            (16, 32),
        ]
        for n, m in [*patterns, *((n, 16) for n in (1, 3, 4, 6, 7, 8, 10, 12, 15))]:
            width = -(-shape[1] // m) * m
            order = rng.random((shape[0], width // m, m)).argsort(axis=2)
            mask = (order < n).reshape(shape[0], width)[:, : shape[1]]
            yield f"{n}:{m} of {shape}", mask
            for lost in (0.02, 0.1, 0.2, 0.25, 0.3):
                yield f"{n}:{m} without {lost:.0%} of {shape}", mask & (rng.random(shape) >= lost)
            less = mask.copy()
            less[shape[0] // 2] = False
            yield f"{n}:{m} and an empty row of {shape}", less
        yield from windows(shape, rng)
        yield from pairs(shape, rng)


def pairs(shape: tuple[int, int], rng: np.random.Generator) -> Iterator[tuple[str, Mask]]:
    """Masks whose rows are equal in pairs, and such as almost are."""
    for kept in (0.0, 0.3, 0.5, 0.7, 0.8):
        mask = np.repeat(rng.random((-(-shape[0] // 2), shape[1])) < kept, 2, axis=0)[: shape[0]]
        yield f"{kept:.0%} in pairs of {shape}", mask
        for lost in (0.01, 0.05, 0.1, 0.2):
            yield f"{kept:.0%} in pairs without {lost:.0%} of {shape}", mask & (rng.random(shape) >= lost)


def windows(shape: tuple[int, int], rng: np.random.Generator) -> Iterator[tuple[str, Mask]]:
    """Masks of sliding windows, and such as almost are."""
    rows, columns = shape
    mask = np.zeros((rows, columns), np.bool_)
    last = np.full(rows, -1)
    for start in range(-1, columns - 2, 2):
        low, high = np.maximum(last + 1, start), min(start + 3, columns - 1)
        last = low + rng.integers(0, 4, rows) % (high + 1 - low)
        mask[np.arange(rows), last] = True
    yield f"sliding of {shape}", mask
    for lost in (0.02, 0.1, 0.3, 0.5):
        less = mask & (rng.random(shape) >= lost)
        yield f"sliding without {lost:.0%} of {shape}", less
        for first in (0, (columns - 5) // 2, max(0, columns - 4)):
            more = less.copy()
            more[-1, first : first + 5] = True
            yield f"sliding without {lost:.0%} and a run of 5 at {first} of {shape}", more
            more[-1, first : first + 5] = np.arange(len(more[-1, first : first + 5])) < 3
            yield f"sliding without {lost:.0%} and a run of 3 at {first} of {shape}", more


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_both_languages_choose_alike(value_type: str, terms: str) -> None:
    seen: Counter[str] = Counter()
    shared = 0
    for what, mask in grid():
        picked = in_python(mask, value_type, TERMS[terms])
        assert in_cpp(mask, value_type, terms) == picked, what
        seen[picked[0]] += 1
        shared += picked == ("bitmask", 2, 0)
    layouts = LAYOUT_NAMES if value_type in ("i8", "i4") else LAYOUT_NAMES[:3]
    assert all(seen[name] >= 3 for name in layouts), "the grid has masks for every layout"
    assert (shared >= 3) == (value_type in ("i8", "i4"))


@pytest.mark.parametrize("value_type", ["i8", "i4"])
@pytest.mark.parametrize("terms", TERMS)
def test_sliding_windows_are_found_alike(value_type: str, terms: str) -> None:
    """Rows of 32 columns one by one, with any share kept: a table and a pass over slots say the same."""
    rng, seen = np.random.default_rng(3), [0, 0]
    for kept in (0.2, 0.3, 0.4, 0.5):
        for row in rng.random((300, 32)) < kept:
            mask = np.tile(row, (16, 1))
            picked = in_python(mask, value_type, TERMS[terms])
            assert in_cpp(mask, value_type, terms) == picked, row.astype(int)
            seen[picked[0] == "sliding"] += 1
    assert seen[0] > 100 and (seen[1] > 100 or terms == "in_file")


@pytest.mark.parametrize(
    "other",
    [
        replace(AT_LOAD, tiles_may_cost=1.4),
        replace(AT_LOAD, tiles_may_cost=1.6),
        replace(AT_LOAD, start_bytes=0),
        replace(AT_LOAD, exact=True),
        IN_FILE,
    ],
)
def test_the_grid_tells_terms_apart(other: Terms) -> None:
    """So that C++ with another number than Python would be noticed."""
    cases = [(mask, value_type) for _, mask in grid() for value_type in ("i8", "i4")]
    assert any(in_python(*case, AT_LOAD) != in_python(*case, other) for case in cases)


def mask_with(kept: int, shape: tuple[int, int]) -> Mask:
    """A mask without a pattern that keeps so many."""
    return np.random.default_rng(kept).permutation(np.arange(shape[0] * shape[1]) < kept).reshape(shape)


def both(mask: Mask, terms: str) -> str:
    """The layout of i8 that both languages choose."""
    picked = in_python(mask, "i8", TERMS[terms])
    assert in_cpp(mask, "i8", terms) == picked
    return picked[0]


def test_ties() -> None:
    """Where sizes are equal: sparse has to be smaller than dense, tiles than the bytes that they may cost."""
    for terms, most in (("in_file", 320), ("at_load", 256)):  # of 512 bytes; positions and padding take 128
        assert both(mask_with(most, (8, 64)), terms) == "bitmask"
        assert both(mask_with(most + 1, (8, 64)), terms) == "dense"
    mask = np.tile(np.arange(16) < 7, (16, 4))
    mask[0, :16], mask[1, :16] = np.arange(16) < 10, np.arange(16) < 4
    assert both(mask, "at_load") == "bitmask"  # 640 bytes, and 10:16 in tiles takes 960
    mask[1, 4] = True  # one more value takes 64 bytes more
    assert both(mask, "at_load") == "tiled"
    assert both(mask, "in_file") == "bitmask"


def test_unknown_terms_and_masks_of_another_shape_are_refused() -> None:
    words = np.zeros(2, np.uint64)
    with pytest.raises(ValueError, match="in_file or at_load"):
        _native.choose(words, 2, 64, 2, "in_memory")
    with pytest.raises(ValueError, match="another shape"):
        _native.choose(words, 2, 65, 2, "in_file")
    with pytest.raises(ValueError, match="behind the columns"):
        _native.choose(words + np.uint64(1 << 63), 2, 63, 2, "in_file")
