"""Masks chosen as a whole: sliding windows against every valid mask, pairs of rows against their sums."""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losa_deploy.compress.patterns import ROWS, Sliding, select_pairs, select_sliding
from losa_deploy.compress.prune import (
    InputStatistics,
    Pattern,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
    select,
    select_group,
)
from losa_deploy.verify.stored import check_pairs, check_sliding

TWO = Fraction(2)
STRIDES = (Fraction(5, 4), Fraction(3, 2), TWO, Fraction(5, 2), Fraction(3))


@cache
def every_mask(columns: int, stride: Fraction) -> Tensor:
    """All masks of one row, from the definition: slot by slot, a position of the window or none."""
    found = {()}
    for slot in range(-int(-columns // stride)):
        start = int(stride * slot) - 1
        window = range(max(start, 0), min(start + 4, columns))
        found |= {(*kept, p) for kept in found for p in window if not kept or kept[-1] < p}
    masks = torch.zeros(len(found), columns, dtype=torch.bool)
    for row, kept in enumerate(sorted(found)):
        masks[row, list(kept)] = True
    return masks


def valid(mask: Tensor, stride: Fraction) -> bool:
    return not check_sliding("x", mask.numpy(), stride)


def blockwise(scores: Tensor, stride: Fraction, allowed: Tensor, width: int, ahead: int) -> Tensor:
    windows, parts = Sliding(stride, *scores.shape), []
    for start in range(0, scores.shape[1], width):
        end = min(start + width, scores.shape[1])
        seen = slice(start, end + ahead)
        parts.append(windows.choose(scores[:, seen], allowed[:, seen], end - start))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 5, 6, 7, 8, 9])
def test_the_search_finds_the_best_of_all_masks_and_of_those_the_fullest(
    columns: int, stride: Fraction
) -> None:
    draw = torch.Generator().manual_seed(columns)
    scores = torch.rand(120, columns, generator=draw, dtype=torch.double)
    scores[::3] = (3 * scores[::3]).floor()  # many ties, many zeros
    allowed = torch.rand(120, columns, generator=draw) > 0.3
    allowed[::4] = True
    masks = every_mask(columns, stride)
    sums = scores @ masks.double().T
    sums[(masks[None] & ~allowed[:, None]).any(dim=2)] = -1.0
    best = sums.amax(dim=1)
    fullest = torch.where(sums >= best[:, None] - 1e-12, masks.sum(dim=1), -1).amax(dim=1)

    mask = select_sliding(scores, stride, allowed)

    assert bool((mask[:, None] == masks[None]).all(dim=2).any(dim=1).all())
    assert not bool((mask & ~allowed).any())
    assert torch.allclose((scores * mask).sum(dim=1), best, atol=1e-12, rtol=0)
    assert torch.equal(mask.sum(dim=1), fullest)


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("columns", [1, 6, 8])
def test_the_check_accepts_exactly_the_valid_masks(columns: int, stride: Fraction) -> None:
    bits = torch.arange(2**columns)[:, None] >> torch.arange(columns) & 1
    expected = {tuple(row) for row in every_mask(columns, stride).tolist()}
    accepted = {tuple(row) for row in bits.bool().tolist() if valid(torch.tensor([row]).bool(), stride)}
    assert accepted == expected


@given(columns=st.integers(1, 60).filter(lambda n: n % 4 != 2), seed=st.integers(0, 50))
def test_every_2_of_4_mask_is_a_sliding_mask(columns: int, seed: int) -> None:
    scores = torch.rand(4, columns, generator=torch.Generator().manual_seed(seed))
    mask = select_group(scores, 2, 4)
    assert valid(mask, TWO)
    best = select_sliding(scores, TWO, torch.ones_like(mask))
    assert bool(((scores * best).sum(dim=1) >= (scores * mask).sum(dim=1) - 1e-5).all())


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("columns", [45, 172, 576])
def test_every_slot_is_filled_where_everything_is_allowed(columns: int, stride: Fraction) -> None:
    allowed = torch.ones(5, columns, dtype=torch.bool)
    for scores in (torch.rand(5, columns), torch.zeros(5, columns)):
        mask = select_sliding(scores, stride, allowed)
        assert valid(mask, stride)
        assert mask.sum(dim=1).tolist() == [-int(-columns // stride)] * 5


@given(
    columns=st.integers(1, 70),
    stride=st.sampled_from(STRIDES),
    width=st.integers(1, 40),
    ahead=st.integers(0, 20),
    seed=st.integers(0, 100),
)
def test_blocks_of_any_width_give_a_valid_mask(
    columns: int, stride: Fraction, width: int, ahead: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores, allowed = torch.rand(6, columns, generator=draw), torch.rand(6, columns, generator=draw) > 0.2
    mask = blockwise(scores, stride, allowed, width, ahead)
    assert valid(mask, stride)
    assert not bool((mask & ~allowed).any())


def test_a_look_ahead_loses_next_to_nothing_and_its_lack_does() -> None:
    scores = torch.rand(64, 172, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    allowed = torch.ones(64, 172, dtype=torch.bool)
    best = float((scores * select_sliding(scores, TWO, allowed)).sum())
    with_it = float((scores * blockwise(scores, TWO, allowed, 32, 16)).sum())
    without = float((scores * blockwise(scores, TWO, allowed, 32, 0)).sum())
    assert best * 0.9999 <= with_it <= best
    assert without < best * 0.999


def test_rows_do_not_depend_on_how_many_are_searched_together() -> None:
    scores = torch.rand(ROWS + 3, 9, generator=torch.Generator().manual_seed(2))
    allowed = scores > 0.2
    mask = select_sliding(scores, TWO, allowed)
    for row in (0, ROWS - 1, ROWS, ROWS + 2):
        assert torch.equal(
            mask[row : row + 1], select_sliding(scores[row : row + 1], TWO, allowed[row : row + 1])
        )


def test_scores_of_every_size_count() -> None:
    """f64 sums: small scores beside large ones still decide."""
    scores = torch.tensor([[1e8, 1e8, 0.0, 0.0, 1.0, 1.5, 2.0, 0.5]])
    mask = select_sliding(scores, TWO, torch.ones(1, 8, dtype=torch.bool))
    assert mask.nonzero()[:, 1].tolist() == [0, 1, 5, 6]


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("scope", ["row", "columns"])
def test_pairs_keep_what_is_best_for_both_rows(rows: int, scope: str) -> None:
    scores = torch.rand(rows, 10, generator=torch.Generator().manual_seed(rows))
    mask = select(scores, Pattern(0.3, scope, paired=True), torch.ones(rows, 10, dtype=torch.bool))
    single = Pattern(0.3, scope)
    if rows > 1:
        summed = scores[: rows // 2 * 2].view(-1, 2, 10).sum(dim=1)
        expected = select(summed, single, torch.ones_like(summed, dtype=torch.bool))
        assert torch.equal(mask[: rows // 2 * 2 : 2], expected)
        assert torch.equal(mask[1::2], expected)
    if rows % 2:
        last = select(scores[-1:], single, torch.ones(1, 10, dtype=torch.bool))
        assert torch.equal(mask[-1:], last)
    assert int(mask.sum()) == 7 * rows
    assert check_pairs("x", mask.numpy()) == []


def test_a_pair_keeps_no_position_that_one_of_its_rows_may_not() -> None:
    allowed = torch.ones(2, 4, dtype=torch.bool)
    allowed[0, 1] = allowed[1, 2] = False
    mask = select_pairs(torch.ones(2, 4), allowed, lambda scores, both: select(scores, Pattern(0.5), both))
    assert mask.tolist() == [[True, False, False, True]] * 2


def test_pairs_of_magnitudes_add_squares() -> None:
    """Pruning 3 and 0 costs 9, pruning 2 and 2 costs 8."""
    weight = torch.tensor([[3.0, 2.0], [0.0, -2.0]])
    mask = prune_magnitude(weight, Pattern(0.5, paired=True), torch.ones(2, 2, dtype=torch.bool)).mask
    assert mask.tolist() == [[True, False]] * 2


PATTERNS = {
    "2:4": Pattern(0.5, kept=2, group=4),
    "sliding": Pattern(0.5, stride=TWO),
    "pair": Pattern(0.5, "columns", paired=True),
    "pair row": Pattern(0.5, paired=True),
}


def correlated(rows: int, columns: int) -> tuple[Tensor, InputStatistics]:
    draw = torch.Generator().manual_seed(columns)
    factors = torch.randn(columns // 4, columns, generator=draw)
    x = torch.randn(1200, columns // 4, generator=draw) @ factors
    x += torch.randn(1200, columns, generator=draw)
    statistics = InputStatistics(columns, hessian=True)
    statistics.add(x)
    return torch.randn(rows, columns, generator=draw), statistics


def error(weight: Tensor, statistics: InputStatistics, pruned: Tensor) -> float:
    """‖(W' - W)·X‖² / ‖W·X‖² in f64."""
    assert statistics.hessian is not None
    h, w = statistics.hessian.double(), weight.double()
    difference = pruned.double() - w
    return float(((difference @ h) * difference).sum() / ((w @ h) * w).sum())


@pytest.mark.parametrize("columns", [45, 172, 256])
def test_sparsegpt_beats_the_other_methods_under_every_pattern(columns: int) -> None:
    weight, statistics = correlated(33, columns)
    allowed = torch.ones_like(weight, dtype=torch.bool)
    errors = {}
    for name, pattern in PATTERNS.items():
        result = prune_sparsegpt(
            weight, deepcopy(statistics), pattern, allowed, damping=0.01, block_columns=128, name="x"
        )
        assert result.weight is not None
        assert torch.equal(result.weight != 0, result.mask)
        errors[name] = error(weight, statistics, result.weight)
        wanda = prune_wanda(weight, statistics, pattern, allowed).mask
        magnitude = prune_magnitude(weight, pattern, allowed).mask
        for mask in (result.mask, wanda, magnitude):
            if pattern.stride:
                assert valid(mask, TWO)
            if pattern.paired:
                assert check_pairs("x", mask.numpy()) == []
            assert int(mask.sum()) == pytest.approx(33 * columns / 2, abs=33 * 0.5)
        assert errors[name] < 0.8 * min(
            error(weight, statistics, weight * wanda), error(weight, statistics, weight * magnitude)
        )
    assert errors["sliding"] < (0.9 if columns > 100 else 1.0) * errors["2:4"]


@pytest.mark.parametrize("columns", [45, 172, 576])
def test_sparsegpt_windows_hold_across_blocks_and_keep_the_mask_before(columns: int) -> None:
    weight, statistics = correlated(9, columns)
    allowed = torch.rand(9, columns, generator=torch.Generator().manual_seed(3)) > 0.3
    for stride in (TWO, Fraction(5, 2)):
        for width in (7, 128):
            pattern = Pattern(float(1 - 1 / stride), stride=stride)
            mask = prune_sparsegpt(
                weight * allowed, statistics, pattern, allowed, damping=0.01, block_columns=width, name="x"
            ).mask
            assert valid(mask, stride)
            assert not bool((mask & ~allowed).any())
