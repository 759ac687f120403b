"""Masks and pruning methods on small exact cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

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


def _reference(
    weight: torch.Tensor, x: torch.Tensor, rate: float, group: tuple[int, int] | None, damping: float
) -> NDArray[np.float64]:
    """SparseGPT in NumPy f64 with an explicit inverse for every column, one block of columns, row counts."""
    inputs, result = x.double().numpy(), weight.double().numpy().copy()
    columns = result.shape[1]
    hessian = inputs.T @ inputs
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(columns)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    diagonal = np.array([inverse[0, 0] for inverse in inverses])
    kept = np.ones(result.shape, bool)
    for j in range(columns):
        width = columns if group is None else group[1]
        if j % width == 0:
            part = slice(j, min(j + width, columns))
            drop = round(rate * columns) if group is None else max(0, part.stop - j - group[0])
            saliency = result[:, part] ** 2 / diagonal[part]
            kept[:, part] = saliency.argsort(axis=1).argsort(axis=1) >= drop
        lost = np.where(kept[:, j], 0.0, result[:, j])
        result[:, j] -= lost
        result[:, j + 1 :] -= np.outer(lost / diagonal[j], inverses[j][0, 1:])
    return result * kept


@pytest.mark.parametrize("damping", [0.01, 0.2])
@pytest.mark.parametrize("group", [None, (2, 4), (3, 8)])
def test_sparsegpt_equals_an_independent_reference(group: tuple[int, int] | None, damping: float) -> None:
    """Inputs correlated and of very different size, so that saliency and damping decide the masks."""
    draw = torch.Generator().manual_seed(6)
    scale = torch.logspace(-1, 1, 22)[torch.randperm(22, generator=draw)]
    x = (torch.randn(300, 8, generator=draw) @ torch.randn(8, 22, generator=draw)) * scale
    x += 0.3 * scale * torch.randn(300, 22, generator=draw)
    weight = torch.randn(12, 22, generator=draw)
    pattern = (
        Pattern(0.5) if group is None else Pattern(1 - group[0] / group[1], kept=group[0], group=group[1])
    )
    ours = prune_sparsegpt(
        weight, _statistics(x), pattern, _all((12, 22)), damping=damping, block_columns=128, name="test"
    )
    expected = _reference(weight, x, 0.5, group, damping)
    assert ours.weight is not None
    assert np.array_equal(ours.mask.numpy(), expected != 0)
    assert np.allclose(ours.weight.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_statistics_sum_over_all_batches() -> None:
    """Batches of different size and scale, against NumPy on all tokens at once."""
    draw = torch.Generator().manual_seed(7)
    batches = [torch.randn(n, 3, 5, generator=draw) * s for n, s in ((4, 3.0), (2, 1.0), (1, 0.1))]
    statistics = InputStatistics(5, hessian=True)
    for batch in batches:
        statistics.add(batch)
    everything = torch.cat(batches).flatten(0, 1).double().numpy()
    assert statistics.count == 21
    assert statistics.hessian is not None
    assert np.allclose(statistics.squares.numpy(), np.square(everything).sum(axis=0), rtol=1e-5)
    assert np.allclose(statistics.hessian.numpy(), everything.T @ everything, rtol=1e-5, atol=1e-4)


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
