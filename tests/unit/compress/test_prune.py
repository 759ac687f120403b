"""Masks and pruning methods on small exact cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losa_deploy.compress.prune import (
    InputStatistics,
    Pattern,
    kept_of_group,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
    select,
    select_group,
)
from losa_deploy.errors import InputError


def _all(shape: tuple[int, int]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _statistics(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[-1], hessian=True)
    statistics.add(x)
    return statistics


def test_row_scope_has_the_same_count_in_every_row() -> None:
    mask = select(torch.rand(7, 10), Pattern(0.3), _all((7, 10)))
    assert mask.sum(dim=1).tolist() == [7] * 7


def test_columns_scope_counts_over_all_rows() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    mask = select(scores, Pattern(0.5, scope="columns"), _all((2, 3)))
    assert mask.tolist() == [[False] * 3, [True] * 3]


@given(
    group=st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    columns=st.integers(1, 70),
    seed=st.integers(0, 50),
)
def test_every_group_keeps_exactly_n_including_the_partial_one(
    group: tuple[int, int], columns: int, seed: int
) -> None:
    n, m = group
    scores = torch.rand(3, columns, generator=torch.Generator().manual_seed(seed))
    mask = select_group(scores, n, m)
    for start in range(0, columns, m):
        part = slice(start, min(start + m, columns))
        kept = mask[:, part]
        assert kept.sum(dim=1).tolist() == [min(n, kept.shape[1])] * 3
        lowest = scores[:, part].masked_fill(~kept, 2.0).amin(1)
        highest = scores[:, part].masked_fill(kept, -1.0).amax(1)
        assert bool((lowest >= highest).all())


@pytest.mark.parametrize("columns", [32, 19, 6])
def test_the_pattern_of_a_mask_is_read_off_it(columns: int) -> None:
    assert [kept_of_group(select_group(torch.rand(3, columns), n, 8), 8) for n in (1, 5)] == [1, 5]
    assert kept_of_group(_all((3, columns)), 8) == 8


def test_positions_not_allowed_never_return() -> None:
    allowed = torch.tensor([[True, False, True, False]])
    scores = torch.tensor([[0.1, 9.0, 0.2, 8.0]])
    assert select(scores, Pattern(0.5), allowed).tolist() == [[True, False, True, False]]
    assert select(scores, Pattern(0.75), allowed).tolist() == [[False, False, True, False]]


def test_magnitude_keeps_the_largest() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, -0.2]])
    assert prune_magnitude(weight, Pattern(0.5), _all((1, 4))).mask.tolist() == [[False, True, True, False]]


def test_wanda_weighs_by_input_norm() -> None:
    weight = torch.tensor([[1.0, 0.5, 0.1, 0.6]])
    x = torch.tensor([[1.0, 4.0, 5.0, 1.0], [1.0, -4.0, -5.0, 1.0]])
    # |w|·‖x‖ per column: 1, 2, 0.5, 0.6 (times a common factor).
    mask = prune_wanda(weight, _statistics(x), Pattern(0.5), _all((1, 4))).mask
    assert mask.tolist() == [[True, True, False, False]]


def _sparsegpt(weight: torch.Tensor, x: torch.Tensor, pattern: Pattern, **options: object) -> torch.Tensor:
    allowed = options.get("allowed", _all((weight.shape[0], weight.shape[1])))
    assert isinstance(allowed, torch.Tensor)
    width = options.get("width", 128)
    assert isinstance(width, int)
    pruned = prune_sparsegpt(
        weight, _statistics(x), pattern, allowed, damping=1e-6, block_columns=width, name="test"
    )
    assert pruned.weight is not None
    assert bool((pruned.weight[~pruned.mask] == 0).all())
    return pruned.weight


def test_sparsegpt_single_removal_is_the_exact_surgeon_update() -> None:
    """Removing only the first column must leave the least-squares optimum on the others."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 4), torch.randn(1, 4)
    weight[0, 0] = 1e-3
    result = _sparsegpt(weight, x, Pattern(0.25))
    assert result[0, 0] == 0
    best = torch.linalg.lstsq(x[:, 1:], x @ weight[0]).solution
    assert torch.allclose(result[0, 1:], best, atol=1e-4)


def test_sparsegpt_beats_magnitude_and_wanda_on_correlated_inputs() -> None:
    torch.manual_seed(1)
    factors = torch.randn(8, 32)
    x, weight = torch.randn(400, 8) @ factors + 0.1 * torch.randn(400, 32), torch.randn(16, 32)
    target = x @ weight.T

    def error(w: torch.Tensor) -> float:
        return float((x @ w.T - target).square().mean())

    full = _all((16, 32))
    wanda = weight * prune_wanda(weight, _statistics(x), Pattern(0.5), full).mask
    magnitude = weight * prune_magnitude(weight, Pattern(0.5), full).mask
    ours = _sparsegpt(weight, x, Pattern(0.5), width=8)
    assert error(ours) < 0.5 * min(error(wanda), error(magnitude))


@pytest.mark.parametrize(("rate", "width"), list(itertools.product([0.3, 0.5, 0.77], [5, 128])))
def test_sparsegpt_row_counts_are_exact_over_column_blocks(rate: float, width: int) -> None:
    torch.manual_seed(2)
    result = _sparsegpt(torch.randn(6, 33), torch.randn(200, 33), Pattern(rate), width=width)
    assert (result == 0).sum(dim=1).tolist() == [round(rate * 33)] * 6


def test_sparsegpt_group_pattern_holds_when_the_width_is_no_multiple() -> None:
    torch.manual_seed(3)
    result = _sparsegpt(torch.randn(4, 19), torch.randn(100, 19), Pattern(0.5, kept=2, group=4), width=6)
    for start in range(0, 19, 4):
        kept = (result[:, start : start + 4] != 0).sum(dim=1)
        assert bool((kept == min(2, 19 - start)).all())


def test_sparsegpt_respects_the_mask_before() -> None:
    torch.manual_seed(4)
    weight, allowed = torch.randn(5, 16), torch.rand(5, 16) > 0.3
    result = _sparsegpt(weight * allowed, torch.randn(80, 16), Pattern(0.5), allowed=allowed)
    assert not bool(((result != 0) & ~allowed).any())


def test_dead_inputs_are_pruned_and_do_not_break_the_factor() -> None:
    torch.manual_seed(5)
    x = torch.randn(50, 8)
    x[:, 3] = 0
    result = _sparsegpt(torch.randn(2, 8), x, Pattern(0.5))
    assert bool(torch.isfinite(result).all())
    assert result[:, 3].tolist() == [0.0, 0.0]


def test_non_finite_inputs_name_the_linear() -> None:
    x = torch.full((4, 4), float("nan"))
    with pytest.raises(InputError, match="test"):
        _sparsegpt(torch.randn(2, 4), x, Pattern(0.5))
