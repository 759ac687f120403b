"""Layouts: exact round trips over every pattern and awkward size, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from losa_deploy.errors import UsageError
from losa_deploy.layouts import LAYOUTS, PackOptions, choose, forced, sliding, unpack
from losa_deploy.layouts.blob import from_blob, to_blob
from losa_deploy.layouts.choose import AT_LOAD
from losa_deploy.layouts.nm import fits, position_bits
from losa_deploy.layouts.values import dequantize, quantize
from losa_deploy.layouts.values.i4 import LINEAR_TABLE

VALUE_TYPES: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")
Matrix = NDArray[np.float32]
Mask = NDArray[np.bool_]


def weight_of(rows: int, columns: int, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    weight[rng.random((rows, columns)) < 0.1] = 0.0  # kept weights may be zero
    return weight


def expected(weight: Matrix, mask: Mask, options: PackOptions) -> Matrix:
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    return dequantize(codes, options.value_type, {"group_size": options.group_size}, meaning)


def check_round_trip(layout: str, weight: Matrix, mask: Mask, options: PackOptions) -> None:
    packed = LAYOUTS[layout].pack(weight, mask, options)
    result = unpack(packed)
    assert result.weight.tobytes() == expected(weight, mask, options).tobytes()
    assert not result.weight[~mask].any()
    assert packed.nnz == mask.sum()
    assert packed.nbytes == LAYOUTS[layout].size(mask, options)
    if layout != "dense":
        assert np.array_equal(result.mask, mask)
    again = LAYOUTS[layout].pack(result.weight, mask, options)
    if options.value_type in ("f32", "f16"):
        assert again.sha256 == packed.sha256


options_strategy = st.builds(
    PackOptions,
    value_type=st.sampled_from(VALUE_TYPES),
    group_size=st.sampled_from((32, 64, 128)),
    scale_type=st.sampled_from(("f32", "f16")),
    table=st.sampled_from((LINEAR_TABLE, (0, 1, 2, 3, 4, 5, 6, 8, -8, -6, -5, -4, -3, -2, -1, 7))),
).map(lambda options: replace(options, table=None) if options.value_type == "i3" else options)


@settings(max_examples=150)
@given(
    layout=st.sampled_from(("dense", "bitmask")),
    rows=st.integers(1, 6),
    columns=st.sampled_from((1, 7, 63, 64, 65, 128, 172, 300)),
    density=st.sampled_from((0.0, 0.3, 0.5, 1.0)),
    options=options_strategy,
    seed=st.integers(0, 2**16),
)
def test_unstructured_masks_round_trip(
    layout: str, rows: int, columns: int, density: float, options: PackOptions, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    mask[rows // 2] = False  # an empty row
    check_round_trip(layout, weight_of(rows, columns, seed), mask, options)


@settings(max_examples=150)
@given(
    rows=st.integers(2, 7),
    columns=st.sampled_from((1, 7, 63, 64, 65, 128, 172, 300)),
    density=st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0)),
    options=options_strategy.filter(lambda options: options.value_type.startswith("i")),
    seed=st.integers(0, 2**16),
)
def test_masks_of_pairs_of_rows_round_trip(
    rows: int, columns: int, density: float, options: PackOptions, seed: int
) -> None:
    mask = pairs_of(rows, columns, density, seed)
    check_round_trip("bitmask", weight_of(rows, columns, seed), mask, replace(options, rows_per_mask=2))


def pairs_of(rows: int, columns: int, density: float, seed: int) -> Mask:
    """Rows 2 i and 2 i + 1 are equal."""
    mask = np.random.default_rng(seed).random((-(-rows // 2), columns)) < density
    return np.repeat(mask, 2, axis=0)[:rows]


def test_only_equal_rows_of_types_with_scales_share_a_mask() -> None:
    weight, mask = weight_of(5, 70, 0), pairs_of(5, 70, 0.5, 0)
    other = mask.copy()
    other[3, 69] ^= True
    for wrong, options in (
        (other, PackOptions("i4", rows_per_mask=2)),
        (mask[:1], PackOptions("i4", rows_per_mask=2)),
        (mask, PackOptions("f16", rows_per_mask=2)),
        (mask, PackOptions("i4", rows_per_mask=4)),
    ):
        with pytest.raises(ValueError, match="do not share masks"):
            LAYOUTS["bitmask"].pack(weight[: len(wrong)], wrong, options)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_equal_rows_share_their_mask_where_that_saves_bytes(value_type: str) -> None:
    options, mask = PackOptions(value_type), pairs_of(7, 640, 0.5, 1)
    chosen = choose(mask, options)
    shared = value_type.startswith("i")
    assert (chosen.layout, chosen.options.rows_per_mask) == ("bitmask", 2 if shared else 1)
    assert ("pairs of rows" in chosen.reason) == shared
    packed = LAYOUTS["bitmask"].pack(weight_of(7, 640, 1), mask, chosen.options)
    assert packed.nbytes == chosen.bytes and packed.arrays["positions"].shape == (4 if shared else 7, 80)
    assert forced("bitmask", "q", mask, options).options.rows_per_mask == chosen.options.rows_per_mask
    other = mask.copy()
    other[4] = ~other[4]
    assert choose(other, options).options.rows_per_mask == 1
    one = pairs_of(1, 640, 0.5, 1)
    assert choose(one, options).options.rows_per_mask == 1


def test_a_mask_of_half_a_bit_stores_what_one_of_a_bit_does_not() -> None:
    """75 % kept in i3: a bit per position takes as much as is saved, half a bit less."""
    mask = pairs_of(64, 4096, 0.75, 2)
    assert choose(mask, PackOptions("i3")).options.rows_per_mask == 2
    mask[::2] = pairs_of(64, 4096, 0.75, 3)[::2]
    assert choose(mask, PackOptions("i3")).layout == "dense"


def test_rows_of_a_pattern_keep_its_layout() -> None:
    """Its kernels count no bits, and it is what the pattern was chosen for."""
    kept = np.tile(np.arange(64) % 4 < 2, (32, 1))
    assert choose(kept, PackOptions("i4")).layout == "tiled"


def nm_mask(rows: int, columns: int, n: int, m: int, seed: int) -> Mask:
    """Exactly N of M; a short last group keeps min(N, width) or its rounded share, row by row."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, columns), np.bool_)
    for row in range(rows):
        for start in range(0, columns, m):
            width = min(m, columns - start)
            keep = n if width == m else (min(n, width) if row % 2 else round(n * width / m))
            mask[row, start + rng.permutation(width)[:keep]] = True
    return mask


@settings(max_examples=200)
@given(data=st.data(), options=options_strategy, seed=st.integers(0, 2**16))
def test_every_n_of_m_round_trips(data: st.DataObject, options: PackOptions, seed: int) -> None:
    m = data.draw(st.integers(2, 32))
    n = data.draw(st.integers(1, m - 1))
    columns = data.draw(st.sampled_from((m, 2 * m, 65, 172, 33)))
    mask = nm_mask(3, columns, n, m, seed)
    assert fits(mask, n, m)
    check_round_trip("nm", weight_of(3, columns, seed), mask, replace(options, pattern=(n, m)))


@settings(max_examples=100)
@given(
    pattern=st.sampled_from([(1, 4), (2, 4), *((n, 16) for n in range(1, 16))]),
    tiles=st.integers(1, 3),
    groups=st.integers(1, 10),
    options=options_strategy,
    seed=st.integers(0, 2**16),
)
def test_tiles_round_trip(
    pattern: tuple[int, int], tiles: int, groups: int, options: PackOptions, seed: int
) -> None:
    rows, columns = 16 * tiles, 16 * groups
    mask, weight = nm_mask(rows, columns, *pattern, seed), weight_of(rows, columns, seed)
    options = replace(options, value_type=("i8", "i4")[seed % 2])
    check_round_trip("tiled", weight, mask, options)
    other = unpack(LAYOUTS["nm"].pack(weight, mask, replace(options, pattern=pattern)))
    assert other.weight.tobytes() == unpack(LAYOUTS["tiled"].pack(weight, mask, options)).weight.tobytes()


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (32, 48), (16, 304)])
def test_sliding_windows_round_trip(
    rows: int, columns: int, value_type: str, sliding_mask: Callable[[int, int, int], Mask]
) -> None:
    options, weight = PackOptions(value_type, 32), weight_of(rows, columns, 0)
    for mask in (sliding_mask(rows, columns, 0), nm_mask(rows, columns, 2, 4, 0)):
        check_round_trip("sliding", weight, mask, options)
        packed = LAYOUTS["sliding"].pack(weight, mask, options)
        again = from_blob(to_blob(packed))
        assert again.sha256 == packed.sha256 and again.nnz == packed.nnz == mask.sum()
    quads = LAYOUTS["tiled"].pack(weight, mask, options)
    assert packed.nbytes == quads.nbytes


def test_sliding_windows_refuse_what_they_cannot_store(sliding_mask: Callable[[int, int, int], Mask]) -> None:
    masks = [sliding_mask(16, 32, 0) for _ in range(3)]
    masks[0][3] = np.arange(32) < 16  # as many as there are windows, but not in them
    masks[1][3, np.flatnonzero(masks[1][3])[0]] = False
    masks[2][3] = True
    options = PackOptions("i8")
    for mask in (*masks, sliding_mask(8, 32, 0), sliding_mask(16, 24, 0)):
        assert not LAYOUTS["sliding"].tolerates(mask, options)
        with pytest.raises(ValueError, match="every window of 4"):
            LAYOUTS["sliding"].pack(weight_of(*mask.shape, 0), mask, options)
    with pytest.raises(ValueError, match="every window of 4"):
        LAYOUTS["sliding"].pack(weight_of(16, 32, 0), sliding_mask(16, 32, 0), PackOptions("f16"))


def test_sliding_windows_are_completed_wherever_they_can_be() -> None:
    """Against every way to give the slots of a row of 16 columns a position each."""
    ways = {0}
    for slot in range(8):
        window = range(max(0, 2 * slot - 1), min(16, 2 * slot + 3))
        ways = {way | 1 << p for way in ways for p in window if way < 1 << p}
    full = np.array(sorted(ways))
    rng, seen = np.random.default_rng(0), [0, 0]
    for few in (False, True):
        for kept in rng.integers(0, 1 << 16, 1000) & (rng.integers(0, 1 << 16, 1000) if few else 0xFFFF):
            row = kept >> np.arange(16) & 1 == 1
            found = sliding.complete(np.tile(row, (16, 1)))
            assert (found is not None) == (full & kept == kept).any(), f"{kept:016b}"
            seen[found is not None] += 1
            if found is not None:
                assert sliding.find_slots(found) is not None
                assert not (row & ~found).any()
    assert min(seen) > 200


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_sliding_windows_are_found_without_the_weights_that_are_zero(
    value_type: str, sliding_mask: Callable[[int, int, int], Mask]
) -> None:
    mask, options = sliding_mask(32, 256, 0), PackOptions(value_type)
    assert np.array_equal(sliding.complete(mask), mask)
    found = mask & (np.random.default_rng(0).random(mask.shape) < 0.8)
    choice = choose(found, options, AT_LOAD)
    assert (choice.layout, choice.bytes) == ("sliding", LAYOUTS["sliding"].size(mask, options))
    assert choose(found, options).layout != "sliding", "in a file the mask is data"
    found[3, 100:105] = True  # windows of four slots reach them
    assert sliding.complete(found) is None
    assert choose(found, options, AT_LOAD).layout != "sliding"


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_sliding_windows_are_chosen(value_type: str, sliding_mask: Callable[[int, int, int], Mask]) -> None:
    mask, options = sliding_mask(32, 256, 0), PackOptions(value_type)
    choice = choose(mask, options)
    assert (choice.layout, choice.bytes) == ("sliding", LAYOUTS["sliding"].size(mask, options))
    assert choose(mask, options, AT_LOAD).layout == "sliding"
    assert choose(nm_mask(32, 256, 2, 4, 0), options).layout == "tiled"
    assert forced("sliding", "q", mask, options).layout == "sliding"
    assert forced("sliding", "q", np.ones((32, 64), np.bool_), options).layout == "dense"
    with pytest.raises(UsageError, match=r"--layout sliding cannot store q \(32 x 256\)"):
        forced("sliding", "q", nm_mask(32, 256, 4, 16, 0), options)


@pytest.mark.parametrize(
    ("rows", "columns", "n", "m", "value_type"),
    [
        (8, 32, 4, 16, "i8"),
        (16, 40, 4, 16, "i8"),
        (16, 32, 4, 8, "i8"),
        (16, 32, 4, 16, "f16"),
        (24, 32, 2, 4, "i8"),
    ],
)
def test_tiles_refuse_what_they_cannot_store(
    rows: int, columns: int, n: int, m: int, value_type: str
) -> None:
    mask = nm_mask(rows, columns, n, m, 0)
    mask[0, :16] = np.arange(16) < 5
    options = PackOptions(value_type)
    if value_type != "f16":
        assert not LAYOUTS["tiled"].tolerates(mask, options)
    with pytest.raises(ValueError, match="N of every 16"):
        LAYOUTS["tiled"].pack(weight_of(rows, columns, 0), mask, options)


def test_all_patterns_are_exact() -> None:
    for m in range(2, 33):
        for n in range(1, m):
            mask = nm_mask(2, 70, n, m, n * m)
            check_round_trip("nm", weight_of(2, 70, m), mask, PackOptions("i8", pattern=(n, m)))


def test_position_form_is_the_smaller_one() -> None:
    assert position_bits(1, 2) == 1 and position_bits(1, 4) == 2 and position_bits(2, 16) == 4
    assert position_bits(1, 32) == 8
    for n, m in ((2, 4), (4, 8), (16, 32), (4, 16), (1, 12)):
        assert position_bits(n, m) == 0


def test_nm_refuses_other_masks() -> None:
    mask = np.random.default_rng(0).random((4, 64)) < 0.5
    with pytest.raises(ValueError, match="2:4"):
        LAYOUTS["nm"].pack(weight_of(4, 64, 0), mask, PackOptions("f32", pattern=(2, 4)))
    short = np.zeros((1, 7), np.bool_)
    short[0, :3] = True  # 3:4, and then none of a last group of 3: one free slot is not enough
    assert not fits(short, 3, 4)


def test_kept_zero_stays_kept() -> None:
    mask = np.zeros((1, 64), np.bool_)
    mask[0, 5] = True
    for value_type in VALUE_TYPES:
        packed = LAYOUTS["bitmask"].pack(np.zeros((1, 64), np.float32), mask, PackOptions(value_type))
        assert packed.nnz == 1 and np.array_equal(unpack(packed).mask, mask)


def test_i8_error_is_half_a_step_and_f16_rounds_once() -> None:
    weight, mask = weight_of(8, 172, 3), np.ones((8, 172), np.bool_)
    packed = LAYOUTS["dense"].pack(weight, mask, PackOptions("i8"))
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(unpack(packed).weight - weight) <= step * 0.5001).all()
    half = unpack(LAYOUTS["dense"].pack(weight, mask, PackOptions("f16"))).weight
    assert np.array_equal(half, weight.astype(np.float16).astype(np.float32))


def test_i4_extreme_of_a_group_is_kept_to_f16_and_zero_is_exact() -> None:
    weight, mask = weight_of(4, 172, 5), np.ones((4, 172), np.bool_)
    decoded = unpack(LAYOUTS["dense"].pack(weight, mask, PackOptions("i4", group_size=64))).weight
    assert not decoded[weight == 0].any()
    for start in (0, 64, 128):
        group = slice(start, min(start + 64, 172))
        peak = np.abs(weight[:, group]).argmax(axis=1)[:, None]
        true = np.take_along_axis(weight[:, group], peak, axis=1)
        assert np.allclose(np.take_along_axis(decoded[:, group], peak, axis=1), true, rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4])
def test_values_that_do_not_fit_are_refused(bad: float) -> None:
    weight = np.full((1, 4), bad, np.float32)
    with pytest.raises(ValueError):
        quantize(weight, PackOptions("f16"))


@pytest.mark.parametrize(
    ("n", "m", "value_type", "rows", "layout"),
    [
        (6, 16, "i4", 64, "tiled"),
        (6, 16, "i8", 64, "tiled"),
        (7, 16, "i8", 64, "tiled"),
        (9, 16, "i4", 64, "bitmask"),  # tiles would be larger than dense
        (6, 16, "f16", 64, "bitmask"),
        (6, 16, "i4", 40, "bitmask"),  # no multiple of 16 rows
        (2, 8, "i4", 64, "tiled"),  # as 4:16, not larger than nm
        (2, 4, "i8", 64, "tiled"),
        (1, 4, "i4", 64, "tiled"),
        (2, 4, "i8", 40, "nm"),
        (1, 4, "f16", 64, "nm"),
        (3, 4, "i8", 64, "nm"),
        (4, 8, "i4", 64, "nm"),
    ],
)
def test_choice_of_tiles(n: int, m: int, value_type: str, rows: int, layout: str) -> None:
    mask = nm_mask(rows, 576, n, m, 1)
    choice = choose(mask, PackOptions(value_type))
    assert choice.layout == layout
    packed = LAYOUTS[layout].pack(weight_of(rows, 576, 0), mask, choice.options)
    assert packed.nbytes == choice.bytes
    assert choice.bytes < LAYOUTS["dense"].size(mask, PackOptions(value_type))
    assert ("tiles" in choice.reason) == (layout == "tiled")


def test_forced_tiles_name_what_they_cannot_store() -> None:
    linear, options = "layers.0.mlp.up_proj", PackOptions("i4")
    assert forced("tiled", linear, nm_mask(32, 64, 2, 4, 0), options).options.pattern == (2, 4)
    assert forced("tiled", linear, nm_mask(32, 64, 3, 4, 0), options).options.pattern == (12, 16)
    assert forced("tiled", linear, np.ones((32, 64), np.bool_), options).layout == "dense"
    for mask in (nm_mask(24, 64, 6, 16, 0), nm_mask(32, 64, 5, 12, 0)):
        with pytest.raises(UsageError, match=rf"{linear} \({mask.shape[0]} x 64\): it needs 1:4, 2:4 or N"):
            forced("tiled", linear, mask, options)
    with pytest.raises(UsageError, match="not f16"):
        forced("tiled", linear, nm_mask(32, 64, 6, 16, 0), PackOptions("f16"))


def test_choice_saves_bytes_or_stays_dense() -> None:
    rng = np.random.default_rng(1)
    half = rng.random((64, 576)) < 0.5
    options = PackOptions("i8")
    assert choose(half, options).layout == "bitmask"
    assert choose(np.ones((64, 576), np.bool_), options).layout == "dense"
    almost_full = rng.random((64, 576)) < 0.95
    choice = choose(almost_full, options)
    assert choice.layout == "dense" and "bitmask takes 1" in choice.reason
    one_of_four = choose(nm_mask(64, 576, 1, 4, 0), options)
    assert (one_of_four.layout, one_of_four.options.pattern) == ("tiled", (1, 4))
    two_of_four = choose(nm_mask(64, 576, 2, 4, 0), options)
    assert two_of_four.layout == "tiled"  # the same bytes as a bitmask, and the faster layout wins
    assert choose(nm_mask(63, 576, 2, 4, 0), options).layout == "nm"
    for mask in (half, almost_full, nm_mask(64, 576, 1, 4, 0)):
        choice = choose(mask, options)
        packed = LAYOUTS[choice.layout].pack(weight_of(64, 576, 2), mask, choice.options)
        assert packed.nbytes == choice.bytes <= LAYOUTS["dense"].size(mask, options)
