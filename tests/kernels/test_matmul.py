"""Every target this CPU can run against a float64 oracle, on awkward sizes and every layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, unpack
from losa_deploy.layouts.values.i4 import LINEAR_TABLE

SHAPES = ((1, 1), (3, 7), (8, 64), (9, 65), (17, 127), (16, 128), (5, 129), (33, 172), (7, 576), (2, 1000))
TOKENS = (1, 2, 4, 5, 17)
PROMPT = 33
"""So many tokens that tiles are expanded to panels (kWorthPanels)."""
PATTERNS = (
    (1, 2),
    (2, 4),
    (4, 8),
    (2, 8),
    (1, 4),
    (1, 8),
    (3, 8),
    (5, 8),
    (2, 16),
    (3, 16),
    (8, 16),
    (1, 32),
    (3, 5),
)
WIDE_TABLE = (0, 9, 18, 31, 47, 66, 90, 127, -127, -90, -66, -47, -31, -18, -9, -4)
Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]
Multiply = Callable[[PackedTensor, Matrix, int], Matrix]
ALL = 1 << 30


def mask_of(layout: str, rows: int, columns: int, pattern: tuple[int, int] | None) -> NDArray[np.bool_]:
    rng = np.random.default_rng(rows * 1000 + columns)
    if pattern is None:
        mask = rng.random((rows, columns)) < rng.random((rows, 1))
        mask[0] = False
        mask[-1] = True
        return mask | (layout == "dense")
    n, m = pattern
    mask = np.zeros((rows, columns), np.bool_)
    for row in range(rows):
        for start in range(0, columns, m):
            width = min(m, columns - start)
            mask[row, start + rng.permutation(width)[: min(n, width)]] = True
    return mask


def packed_of(layout: str, value_type: str, rows: int, columns: int, **options: object) -> PackedTensor:
    pattern = options.get("pattern")
    mask = mask_of(layout, rows, columns, pattern)  # type: ignore[arg-type]
    weight = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
    return LAYOUTS[layout].pack(weight, mask, PackOptions(value_type, **options))  # type: ignore[arg-type]


def inputs(tokens: int, columns: int) -> NDArray[np.float32]:
    x = np.random.default_rng(tokens).standard_normal((tokens, columns)).astype(np.float32)
    x[:, ::5] *= 20
    x[-1, : columns // 2] = 0  # groups without any activation
    return x


def rounded(x: NDArray[np.float32], group: int) -> Floats:
    """What integer kernels multiply by: int8 per token and group, scale = largest magnitude / 127."""
    tokens, columns = x.shape
    grouped = np.zeros((tokens, -(-columns // group) * group), np.float32)
    grouped[:, :columns] = x
    grouped = grouped.reshape(tokens, -1, group)
    peak = np.abs(grouped).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    levels = np.rint(grouped * inverse).astype(np.float64)
    assert np.abs(levels).max() <= 127
    return (levels * (peak / np.float32(127))).reshape(tokens, -1)[:, :columns]


def check(multiply: Multiply, packed: PackedTensor, tokens: int, step: int = ALL) -> None:
    x = inputs(tokens, packed.shape[1])
    group = packed.params.get("group_size", 64)
    exact = rounded(x, group) if packed.value_type in ("i8", "i4", "i3") else x.astype(np.float64)
    weight = unpack(packed).weight.astype(np.float64)
    expected = exact @ weight.T
    # f32 sums of at most `columns` products in any order, scales and their products rounded as well:
    # eps * (sqrt(columns) + 4) of the sum of magnitudes. Offset kernels multiply levels of up to 255 instead
    # of up to 127, which the sum of |x| * largest weight of the row covers.
    magnitude = np.abs(exact) @ np.abs(weight.T) + np.abs(exact).sum(1)[:, None] * 2 * np.abs(weight).max(1)
    tolerance = np.finfo(np.float32).eps * (np.sqrt(packed.shape[1]) + 4) * magnitude + 1e-30
    y = multiply(packed, x, step)
    assert y.shape == expected.shape
    worst = (np.abs(y - expected) / tolerance).max()
    assert worst <= 1, (packed.layout, packed.value_type, packed.shape, dict(packed.params), tokens, worst)


DENSE_AND_BITMASK = [(layout, kind) for layout in ("dense", "bitmask") for kind in ("f32", "f16", "i8", "i4")]


@pytest.mark.parametrize(("layout", "value_type"), [*DENSE_AND_BITMASK, ("dense", "i3")])
def test_dense_and_bitmask(multiply: Multiply, layout: str, value_type: str) -> None:
    for rows, columns in SHAPES:
        packed = packed_of(layout, value_type, rows, columns)
        for tokens in TOKENS:
            check(multiply, packed, tokens)


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}of{p[1]}")
def test_n_of_m(multiply: Multiply, pattern: tuple[int, int], value_type: str) -> None:
    for rows, columns in ((3, 64), (5, 65), (9, 200), (4, 333)):
        packed = packed_of("nm", value_type, rows, columns, pattern=pattern)
        for tokens in (1, 3):
            check(multiply, packed, tokens)


QUADS = ((1, 4), (2, 4))
WIDE = tuple((n, 16) for n in (1, 2, 3, 4, 6, 8, 11, 15))
TILES = [(pattern, kind) for pattern in (*QUADS, *WIDE) for kind in ("i8", "i4")]


@pytest.mark.parametrize(("pattern", "value_type"), [*TILES, *((pattern, "i3") for pattern in QUADS)])
def test_tiles(multiply: Multiply, pattern: tuple[int, int], value_type: str) -> None:
    for rows, columns in ((16, 16), (32, 64), (48, 176), (16, 336)):
        packed = packed_of("tiled", value_type, rows, columns, pattern=pattern)
        for tokens in (*TOKENS, PROMPT):
            check(multiply, packed, tokens)
    check(multiply, packed_of("tiled", value_type, 80, 160, pattern=pattern, scale_type="f16"), 5, 32)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 16), (8, 16), (15, 16)])
def test_groups_and_tables_of_tiles(multiply: Multiply, pattern: tuple[int, int]) -> None:
    tables = {
        "linear": LINEAR_TABLE,
        "wide": WIDE_TABLE,
        # As narrow as the linear one, but the highest bit of a code is not the sign of its level.
        "alternating": (0, -1, 2, -3, 4, -5, 6, -7, 8, -8, 7, -6, 5, -4, 3, -2),
    }
    for group_size in (32, 64, 128):
        for table in tables.values():
            options = {"pattern": pattern, "group_size": group_size, "table": table}
            packed = packed_of("tiled", "i4", 32, 304, **options)
            for tokens in (1, 5, 18, PROMPT):
                check(multiply, packed, tokens)


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_i4(multiply: Multiply, layout: str, group_size: int) -> None:
    for rows, columns in SHAPES:
        for tokens in (1, 5):
            check(multiply, packed_of(layout, "i4", rows, columns, group_size=group_size), tokens)
            check(
                multiply,
                packed_of(layout, "i4", rows, columns, group_size=group_size, table=WIDE_TABLE),
                tokens,
            )


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
def test_f16_row_scales_and_row_ranges(multiply: Multiply, value_type: str) -> None:
    for layout in ("dense", "bitmask"):
        packed = packed_of(layout, value_type, 43, 300, scale_type="f16")
        for step in (16, 32):
            check(multiply, packed, 1, step)
            check(multiply, packed, 6, step)


def test_levels_at_their_limits_do_not_saturate(multiply: Multiply) -> None:
    """All weights and activations at +-127: the largest sums that int8 products can make."""
    weight = np.where(np.arange(256) % 3 == 0, -1.0, 1.0).astype(np.float32)[None].repeat(4, 0)
    mask = np.ones((4, 256), np.bool_)
    for layout in ("dense", "bitmask"):
        packed = LAYOUTS[layout].pack(weight, mask, PackOptions("i8"))
        for tokens in (1, 4):
            x = np.repeat(np.where(weight[:1] < 0, -3.0, 3.0).astype(np.float32), tokens, 0)
            assert np.allclose(multiply(packed, x, ALL), 3.0 * 256, rtol=1e-5)


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_tiles_at_their_limits_do_not_saturate(multiply: Multiply, value_type: str) -> None:
    """All kept weights at the widest level, all activations at 127: up to 15 of 16, groups of 128."""
    weight, positions = np.full((16, 256), -1.0, np.float32), np.arange(256)[None].repeat(16, 0)
    for mask in (positions % 16 != 3, positions % 2 == 0, positions % 4 == 3):
        packed = LAYOUTS["tiled"].pack(weight, mask, PackOptions(value_type, 128))
        for tokens in (1, 4, 16, PROMPT):
            for sign in (-3.0, 3.0):
                x = np.full((tokens, 256), sign, np.float32)
                assert np.allclose(multiply(packed, x, ALL), -sign * mask[0].sum(), rtol=1e-3)


def test_targets_can_be_forced() -> None:
    names = _native.targets()
    assert names[0] == "scalar"
    assert _native.target_name() == names[-1] or "LOSA_KERNELS" in _native.target_reason()
    _native.set_target("scalar")
    assert _native.target_name() == "scalar"
    with pytest.raises(RuntimeError, match="cannot run"):
        _native.set_target("pentium")
    _native.set_target("")
