"""Every target this CPU can run against a float64 oracle, on awkward sizes and every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, unpack
from losa_deploy.layouts.values.i4 import LINEAR_TABLE

from .conftest import opened

SHAPES = ((1, 1), (3, 7), (8, 64), (9, 65), (17, 127), (16, 128), (5, 129), (33, 172), (7, 576), (2, 1000))
TOKENS = (1, 2, 3, 4, 5, 8, 17)
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
    (2, 5),
    (4, 16),
)
WIDE_TABLE = (0, 9, 18, 31, 47, 66, 90, 127, -127, -90, -66, -47, -31, -18, -9, -4)
Floats = NDArray[np.float64]
Matrix = NDArray[np.float32]
Case = tuple[PackedTensor, Matrix, int]
MultiplyAll = Callable[[Sequence[Case]], list[Matrix]]
RandomMask = Callable[[int, int, tuple[int, int] | None, int], NDArray[np.bool_]]
SlidingMask = Callable[[int, int, int], NDArray[np.bool_]]
PairMask = Callable[[int, int, int], NDArray[np.bool_]]
ALL = 1 << 30


@pytest.fixture(scope="module")
def packed_of(random_mask: RandomMask, sliding_mask: SlidingMask) -> Callable[..., PackedTensor]:
    """A function: layout, value type, rows, columns, options of `PackOptions` → a random packed tensor."""

    def make(layout: str, value_type: str, rows: int, columns: int, **options: object) -> PackedTensor:
        if layout == "sliding":
            mask = sliding_mask(rows, columns, 0)
        else:
            mask = random_mask(rows, columns, options.get("pattern"), 0)  # type: ignore[arg-type]
        weight = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
        mask |= layout == "dense"
        return LAYOUTS[layout].pack(weight, mask, PackOptions(value_type, **options))  # type: ignore[arg-type]

    return make


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


def case(packed: PackedTensor, tokens: int, step: int = ALL) -> Case:
    return packed, inputs(tokens, packed.shape[1]), step


def check(multiply_all: MultiplyAll, cases: Sequence[Case]) -> None:
    for (packed, x, _), y in zip(cases, multiply_all(cases), strict=True):
        compare(packed, x, y)


def compare(packed: PackedTensor, x: Matrix, y: Matrix) -> None:
    group = packed.params.get("group_size", 64)
    exact = rounded(x, group) if packed.value_type in ("i8", "i4", "i3") else x.astype(np.float64)
    weight = unpack(packed).weight.astype(np.float64)
    expected = exact @ weight.T
    # f32 sums of at most `columns` products in any order, scales and their products rounded as well:
    # eps * (sqrt(columns) + 4) of the sum of magnitudes. Offset kernels multiply levels of up to 255 instead
    # of up to 127, which the sum of |x| * largest weight of the row covers.
    magnitude = np.abs(exact) @ np.abs(weight.T) + np.abs(exact).sum(1)[:, None] * 2 * np.abs(weight).max(1)
    tolerance = np.finfo(np.float32).eps * (np.sqrt(packed.shape[1]) + 4) * magnitude + 1e-30
    label = (packed.layout, packed.value_type, packed.shape, dict(packed.params), len(x))
    assert y.shape == expected.shape, label
    worst = (np.abs(y - expected) / tolerance).max()
    assert worst <= 1, (*label, worst)


LAYOUTS_AND_TYPES = tuple(
    (layout, kind) for layout in ("dense", "bitmask") for kind in ("f32", "f16", "i8", "i4", "i3")
)
QUADS = ((1, 4), (2, 4))
TILES = tuple(
    (pattern, kind)
    for pattern in (*QUADS, *((n, 16) for n in (1, 2, 3, 4, 6, 8, 11, 15)))
    for kind in ("i8", "i4")
)


@pytest.mark.parametrize(("layout", "value_type"), LAYOUTS_AND_TYPES)
def test_dense_and_bitmask(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], layout: str, value_type: str
) -> None:
    weights = [packed_of(layout, value_type, *shape) for shape in SHAPES]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in TOKENS])


def pairs_of(
    mask: NDArray[np.bool_], value_type: str, group_size: int = 128, table: tuple[int, ...] | None = None
) -> PackedTensor:
    """A random tensor whose rows share this mask in pairs."""
    weight = np.random.default_rng(mask.size).standard_normal(mask.shape).astype(np.float32)
    options = PackOptions(value_type, group_size, table=table, rows_per_mask=2)
    return LAYOUTS["bitmask"].pack(weight, mask, options)


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_pairs_of_rows_that_share_a_mask(
    multiply_all: MultiplyAll, pair_mask: PairMask, value_type: str
) -> None:
    """Rows in odd and even numbers, rows that end anywhere, and parts of the rows as threads take them."""
    shapes = [shape for shape in SHAPES if shape[0] > 1]
    weights = [pairs_of(pair_mask(*shape, 0), value_type) for shape in shapes]
    cases = [case(weight, tokens) for weight in weights for tokens in TOKENS]
    many = pairs_of(pair_mask(43, 300, 0), value_type, 32)
    cases += [case(many, tokens, step) for step in (16, 32) for tokens in (1, 2, 3, 6, 8)]
    check(multiply_all, cases)


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_rows_that_share_a_mask_have_their_own_values(
    multiply_all: MultiplyAll, pair_mask: PairMask, value_type: str
) -> None:
    """Each token finds one column of the weight: a value, or its scale, that is its partner's is seen there.

    The last rows fill half a panel, or a part of it, or are alone.
    """
    columns = (0, 5, 31, 32, 63, 64, 127, 128, 199)
    one_hot = np.eye(200, dtype=np.float32)[list(columns)]
    weights = [pairs_of(pair_mask(rows, 200, 1), value_type, 32) for rows in (15, 22, 31, 48)]
    cases = [
        (weight, one_hot[start : start + tokens], ALL)
        for weight in weights
        for tokens in (1, 2, 3, 9)
        for start in range(0, len(columns) - tokens + 1, tokens)
    ]
    for (weight, x, _), y in zip(cases, multiply_all(cases), strict=True):
        expected = x @ unpack(weight).weight.T
        assert np.allclose(y, expected, rtol=1e-5, atol=1e-6), (weight.shape, x.argmax(axis=1).tolist())


@pytest.mark.parametrize("value_type", ["i4", "i3"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_pairs_of_rows(
    multiply_all: MultiplyAll, pair_mask: PairMask, group_size: int, value_type: str
) -> None:
    tables = {
        "i4": (None, WIDE_TABLE, (0, -1, 2, -3, 4, -5, 6, -7, 8, -8, 7, -6, 5, -4, 3, -2)),
        "i3": (None, (0, 20, 60, 127, -127, -60, -20, -5), (0, -1, 2, -3, 4, -4, 3, 1)),
    }
    weights = [
        pairs_of(pair_mask(*shape, 0), value_type, group_size, table)
        for shape in ((9, 65), (33, 172), (7, 576), (5, 3000))
        for table in tables[value_type]
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 2, 3, 5, 18)])


def test_pairs_of_rows_of_i3_of_every_length(multiply_all: MultiplyAll) -> None:
    """Pair r keeps r of 140 positions: every length of a short block, and nothing."""
    mask = np.arange(140)[None].repeat(141, 0) < np.arange(141)[:, None]
    mask = np.repeat(np.random.default_rng(0).permuted(mask, axis=1), 2, axis=0)
    check(multiply_all, [case(pairs_of(mask, "i3", 64), tokens) for tokens in (1, 3)])


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_pairs_of_rows_at_their_limits_do_not_saturate(multiply_all: MultiplyAll, value_type: str) -> None:
    weight, mask = np.full((4, 256), -1.0, np.float32), np.ones((4, 256), np.bool_)
    packed = LAYOUTS["bitmask"].pack(weight, mask, PackOptions(value_type, 128, rows_per_mask=2))
    cases = [
        (packed, np.full((tokens, 256), x, np.float32), ALL) for tokens in (1, 2, 4, 16) for x in (-3.0, 3.0)
    ]
    for (_, x, _), y in zip(cases, multiply_all(cases), strict=True):
        assert np.allclose(y, -x[0, 0] * 256, rtol=1e-3), (len(x), x[0, 0])


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4", "i3"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p[0]}of{p[1]}")
def test_n_of_m(
    multiply_all: MultiplyAll,
    packed_of: Callable[..., PackedTensor],
    pattern: tuple[int, int],
    value_type: str,
) -> None:
    shapes = ((5, 1), (3, 7), (3, 64), (5, 65), (9, 200), (4, 333), (33, 576))
    weights = [packed_of("nm", value_type, *shape, pattern=pattern) for shape in shapes]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 3, 17)])


@pytest.mark.parametrize(("pattern", "value_type"), [*TILES, *((pattern, "i3") for pattern in QUADS)])
def test_tiles(
    multiply_all: MultiplyAll,
    packed_of: Callable[..., PackedTensor],
    pattern: tuple[int, int],
    value_type: str,
) -> None:
    shapes = ((16, 16), (32, 64), (48, 176), (16, 336))
    weights = [packed_of("tiled", value_type, *shape, pattern=pattern) for shape in shapes]
    cases = [case(weight, tokens) for weight in weights for tokens in (*TOKENS, PROMPT)]
    short = packed_of("tiled", value_type, 80, 160, pattern=pattern, scale_type="f16")
    check(multiply_all, [*cases, case(short, 5, 32)])


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_sliding_windows(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], value_type: str
) -> None:
    shapes = ((16, 16), (32, 64), (48, 176), (16, 336), (32, 256))
    weights = [packed_of("sliding", value_type, *shape) for shape in shapes]
    cases = [case(weight, tokens) for weight in weights for tokens in (*TOKENS, PROMPT)]
    short = packed_of("sliding", value_type, 80, 160, scale_type="f16")
    check(multiply_all, [*cases, case(short, 5, 32)])


@pytest.mark.parametrize("value_type", ["i4", "i3"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_sliding_windows(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], group_size: int, value_type: str
) -> None:
    """Slots at the border of two groups have the scales of the group that their position is in."""
    tables = {
        "i4": (LINEAR_TABLE, WIDE_TABLE, (0, -1, 2, -3, 4, -5, 6, -7, 8, -8, 7, -6, 5, -4, 3, -2)),
        "i3": (None, (0, 20, 60, 127, -127, -60, -20, -5), (0, -1, 2, -3, 4, -4, 3, 1)),
    }
    weights = [
        packed_of("sliding", value_type, *shape, group_size=group_size, table=table)
        for shape in ((32, 304), (16, 256), (16, 48))
        for table in tables[value_type]
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 5, 18, PROMPT)])


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_sliding_windows_at_their_limits_do_not_saturate(
    multiply_all: MultiplyAll, sliding_mask: SlidingMask, value_type: str
) -> None:
    weight, mask = np.full((16, 256), -1.0, np.float32), sliding_mask(16, 256, 0)
    packed = LAYOUTS["sliding"].pack(weight, mask, PackOptions(value_type, 128))
    cases = [
        (packed, np.full((tokens, 256), x, np.float32), ALL)
        for tokens in (1, 4, 16, PROMPT)
        for x in (-3.0, 3.0)
    ]
    for (_, x, _), y in zip(cases, multiply_all(cases), strict=True):
        assert np.allclose(y, -x[0, 0] * 128, rtol=1e-3), (len(x), x[0, 0])


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 16), (8, 16), (15, 16)])
def test_groups_and_tables_of_tiles(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], pattern: tuple[int, int]
) -> None:
    tables = {
        "linear": LINEAR_TABLE,
        "wide": WIDE_TABLE,
        # As narrow as the linear one, but the highest bit of a code is not the sign of its level.
        "alternating": (0, -1, 2, -3, 4, -5, 6, -7, 8, -8, 7, -6, 5, -4, 3, -2),
    }
    weights = [
        packed_of("tiled", "i4", 32, 304, pattern=pattern, group_size=group_size, table=table)
        for group_size in (32, 64, 128)
        for table in tables.values()
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 5, 18, PROMPT)])


@pytest.mark.parametrize("pattern", [None, *QUADS])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_i3(
    multiply_all: MultiplyAll,
    packed_of: Callable[..., PackedTensor],
    pattern: tuple[int, int] | None,
    group_size: int,
) -> None:
    """Tables: the linear one, one that is wide, one whose codes are no two's complement."""
    tables = (None, (0, 20, 60, 127, -127, -60, -20, -5), (0, -1, 2, -3, 4, -4, 3, 1))
    shapes = SHAPES if pattern is None else ((16, 16), (16, 48), (32, 304), (48, 160))
    layout = "dense" if pattern is None else "tiled"
    weights = [
        packed_of(layout, "i3", *shape, group_size=group_size, table=table, pattern=pattern)
        for shape in shapes
        for table in tables
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 5, 18, PROMPT)])


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (2, 5)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_streams_of_i3(
    multiply_all: MultiplyAll,
    packed_of: Callable[..., PackedTensor],
    pattern: tuple[int, int] | None,
    group_size: int,
) -> None:
    """Also rows of which more codes are kept than a kernel unpacks at a time."""
    tables = (None, (0, 20, 60, 127, -127, -60, -20, -5), (0, -1, 2, -3, 4, -4, 3, 1))
    layout = "nm" if pattern else "bitmask"
    weights = [
        packed_of(layout, "i3", *shape, group_size=group_size, table=table, pattern=pattern)
        for shape in ((9, 65), (33, 172), (7, 576), (5, 3000))
        for table in tables
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 5, 18)])


def test_rows_of_i3_of_every_length(multiply_all: MultiplyAll) -> None:
    """Row r keeps r of 260 positions: every length of a short block, and nothing."""
    mask = np.arange(260)[None].repeat(261, 0) < np.arange(261)[:, None]
    mask = np.random.default_rng(0).permuted(mask, axis=1)
    weight = np.random.default_rng(1).standard_normal(mask.shape).astype(np.float32)
    packed = LAYOUTS["bitmask"].pack(weight, mask, PackOptions("i3", 64))
    check(multiply_all, [case(packed, tokens) for tokens in (1, 3)])


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_and_tables_of_i4(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], layout: str, group_size: int
) -> None:
    pattern = {"pattern": (2, 5)} if layout == "nm" else {}
    weights = [
        packed_of(layout, "i4", *shape, group_size=group_size, **pattern, **table)
        for shape in SHAPES
        for table in ({}, {"table": WIDE_TABLE})
    ]
    check(multiply_all, [case(weight, tokens) for weight in weights for tokens in (1, 5)])


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
def test_f16_row_scales_and_row_ranges(
    multiply_all: MultiplyAll, packed_of: Callable[..., PackedTensor], value_type: str
) -> None:
    weights = [packed_of(layout, value_type, 43, 300, scale_type="f16") for layout in ("dense", "bitmask")]
    ranges = [case(weight, tokens, step) for weight in weights for step in (16, 32) for tokens in (1, 6)]
    check(multiply_all, ranges)


def test_levels_at_their_limits_do_not_saturate(multiply_all: MultiplyAll) -> None:
    """All weights and activations at +-127: the largest sums that int8 products can make."""
    weight = np.where(np.arange(256) % 3 == 0, -1.0, 1.0).astype(np.float32)[None].repeat(4, 0)
    mask = np.ones((4, 256), np.bool_)
    x = np.where(weight[:1] < 0, -3.0, 3.0).astype(np.float32)
    cases = [
        (LAYOUTS[layout].pack(weight, mask, PackOptions("i8")), np.repeat(x, tokens, 0), ALL)
        for layout in ("dense", "bitmask")
        for tokens in (1, 4)
    ]
    for (packed, asked, _), y in zip(cases, multiply_all(cases), strict=True):
        assert np.allclose(y, 3.0 * 256, rtol=1e-5), (packed.layout, len(asked))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_tiles_at_their_limits_do_not_saturate(multiply_all: MultiplyAll, value_type: str) -> None:
    """All kept weights at the widest level, all activations at 127: up to 15 of 16, groups of 128."""
    weight, positions = np.full((16, 256), -1.0, np.float32), np.arange(256)[None].repeat(16, 0)
    cases = [
        (LAYOUTS["tiled"].pack(weight, mask, PackOptions(value_type, 128)), np.full((tokens, 256), x), ALL)
        for mask in (positions % 16 != 3, positions % 2 == 0, positions % 4 == 3)
        if value_type != "i3" or mask[0].sum() < 240  # i3 has no tiles of N:16
        for tokens in (1, 4, 16, PROMPT)
        for x in (np.float32(-3), np.float32(3))
    ]
    for (packed, x, _), y in zip(cases, multiply_all(cases), strict=True):
        kept = packed.nnz // packed.shape[0]
        assert np.allclose(y, -x[0, 0] * kept, rtol=1e-3), (kept, len(x), x[0, 0])


@pytest.mark.parametrize("layout", ["dense", "sliding"])
def test_threads_share_the_rows(packed_of: Callable[..., PackedTensor], layout: str) -> None:
    for rows in (16, 48, 160) if layout == "sliding" else (1, 16, 33, 130):
        packed = packed_of(layout, "i8", rows, 96)
        tensor, x = opened(packed), inputs(5, 96)
        one = tensor.matmul(x)
        for threads in (2, 3, 64):
            assert np.array_equal(tensor.matmul(x, threads=threads), one)
    with pytest.raises(ValueError, match="a row and a thread"):
        tensor.matmul(x, threads=0)


def test_targets_can_be_forced() -> None:
    names = _native.targets()
    assert names[0] == "scalar"
    assert _native.target_name() == names[-1] or "LOSA_KERNELS" in _native.target_reason()
    _native.set_target("scalar")
    assert _native.target_name() == "scalar"
    with pytest.raises(RuntimeError, match="cannot run"):
        _native.set_target("pentium")
    _native.set_target("")
