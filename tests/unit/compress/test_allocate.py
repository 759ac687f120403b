"""Rates and ranks: totals are met exactly, whatever the profile."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_deploy.compress import allocate


def test_cubic_ramp_reproduces_the_published_values() -> None:
    ramp = [allocate.sparsity_ramp(0.7, t, 5, "cubic") for t in range(1, 6)]
    assert ramp == pytest.approx([0.3416, 0.5488, 0.6552, 0.6944, 0.7])
    assert allocate.sparsity_ramp(0.5, 1, 1, "cubic") == 0.5
    assert allocate.sparsity_ramp(0.5, 1, 5, "none") == 0.5


def test_rank_ramp_is_linear() -> None:
    assert [allocate.rank_ramp(6, 10, t, 5) for t in range(1, 6)] == [6, 7, 8, 9, 10]
    assert allocate.rank_ramp(6, 10, 1, 1) == 10


def test_two_level_matches_the_linear_program() -> None:
    from scipy.optimize import linprog

    importance = np.random.default_rng(0).uniform(0.5, 1.0, 8)
    target, delta = 0.6, 0.02
    solved = linprog(
        importance, A_eq=np.ones((1, 8)) / 8, b_eq=[target], bounds=[(target - delta, target + delta)] * 8
    )
    deviation = allocate.two_level_deviation(importance)
    ours = allocate.allocate_rates(target, deviation, delta, np.ones(8), np.zeros(8))
    assert ours == pytest.approx(solved.x, abs=1e-9)


def test_graded_keeps_order_and_distance() -> None:
    importance = np.array([1.0, 0.5, 0.75])
    assert allocate.graded_deviation(importance) == pytest.approx([-1.0, 1.0, 0.0])
    assert allocate.graded_deviation(np.full(3, 0.4)).tolist() == [0.0, 0.0, 0.0]


@given(
    target=st.floats(0.05, 0.95),
    limit=st.floats(0.0, 0.04),
    deviation=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    seed=st.integers(0, 100),
)
def test_rates_have_exactly_the_target_mean_and_stay_in_the_box(
    target: float, limit: float, deviation: list[float], seed: int
) -> None:
    weights = np.random.default_rng(seed).integers(1, 1000, len(deviation)).astype(np.float64)
    rates = allocate.allocate_rates(target, np.array(deviation), limit, weights, np.zeros(len(deviation)))
    assert float(rates @ weights / weights.sum()) == pytest.approx(target, abs=1e-9)
    assert np.all(rates >= target - limit - 1e-9)
    assert np.all(rates <= target + limit + 1e-9)


def test_blocks_already_sparser_keep_their_rate_and_others_give_way() -> None:
    floor = np.array([0.56, 0.0, 0.0, 0.0])
    rates = allocate.allocate_rates(0.5, np.zeros(4), 0.05, np.ones(4), floor)
    assert rates[0] >= 0.56
    assert rates.mean() == pytest.approx(0.5, abs=1e-12)


def test_largest_remainder_by_hand() -> None:
    assert allocate.largest_remainder(np.array([2.6, 2.6, 0.8]), 6, 0, 10).tolist() == [3, 2, 1]
    assert allocate.largest_remainder(np.array([9.0, 1.0]), 6, 1, 4).tolist() == [4, 2]


@given(
    errors=st.lists(st.floats(0.0, 1e3), min_size=1, max_size=40),
    mean=st.floats(1.0, 16.0),
)
def test_rank_budget_is_met_exactly_under_the_cap(errors: list[float], mean: float) -> None:
    ranks = allocate.allocate_ranks(np.array(errors), mean, 16)
    assert int(ranks.sum()) == min(max(round(len(errors) * mean), len(errors)), 16 * len(errors))
    assert ranks.min() >= 1
    assert ranks.max() <= 16


def test_steep_error_profile_does_not_lose_budget() -> None:
    """Repairing by ±1 once, as the published program does, falls short here (267 of 320)."""
    errors = np.linspace(0.01, 1.0, 32) ** 4
    ranks = allocate.allocate_ranks(errors, 10, 16)
    assert int(ranks.sum()) == 320
    assert list(ranks) == sorted(ranks)


def test_mixed_kept_averages_to_n() -> None:
    wanted = 8 * (1 - np.array([0.3, 0.5, 0.5, 0.7]))
    kept = allocate.mixed_kept(wanted, [range(1, 8)] * 4, np.ones(4), 4)
    assert kept.tolist() == [6, 4, 4, 2]


@given(
    blocks=st.lists(
        st.tuples(st.floats(0.5, 8.5), st.integers(1, 8), st.sampled_from([1, 2, 3, 7, 50])),
        min_size=1,
        max_size=4,
    ),
    step=st.sampled_from([1, 2]),
    mean=st.integers(1, 7),
)
def test_mixed_kept_is_the_nearest_mean_and_then_the_nearest_to_what_is_wanted(
    blocks: list[tuple[float, int, int]], step: int, mean: int
) -> None:
    """Against all choices, for unequal blocks some of which can no longer keep much."""
    wanted = np.array([w for w, _, _ in blocks])
    levels = [tuple(range(step, most + 1, step)) or (most,) for _, most, _ in blocks]
    sizes = np.array([64.0 * size for _, _, size in blocks])
    every = [np.array(choice) for choice in itertools.product(*levels)]
    off = [abs(float(np.average(choice, weights=sizes)) - mean) for choice in every]
    cost = [float(sizes @ (choice - wanted) ** 2) for choice in every]
    nearest = min(off)
    found = allocate.mixed_kept(wanted, levels, sizes, mean)
    assert all(int(n) in block for n, block in zip(found, levels, strict=True))
    assert abs(float(np.average(found, weights=sizes)) - mean) == pytest.approx(nearest, abs=1e-9)
    # Means equally far on both sides: the one above is taken whatever it costs.
    above = max(
        float(np.average(c, weights=sizes)) for c, o in zip(every, off, strict=True) if o < nearest + 1e-9
    )
    same = [
        price
        for choice, price in zip(every, cost, strict=True)
        if abs(float(np.average(choice, weights=sizes)) - above) < 1e-9
    ]
    assert float(sizes @ (found - wanted) ** 2) == pytest.approx(min(same), abs=1e-6)


def test_mixed_kept_of_sizes_without_a_common_divisor_is_near_and_bounded() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(10**6, 10**8, 40).astype(np.float64)
    kept = allocate.mixed_kept(draw.uniform(2, 6, 40), [range(1, 8)] * 40, sizes, 4)
    assert float(np.average(kept, weights=sizes)) == pytest.approx(4, abs=1e-3)
