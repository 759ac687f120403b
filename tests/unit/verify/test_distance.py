"""Divergence, tolerance and greedy comparison on cases small enough for a pencil."""

import math

import numpy as np
import pytest

from losa_deploy.verify.distance import (
    GreedyTrace,
    compare_greedy,
    compare_logits,
    kl_divergence,
    log_softmax,
    logit_tolerance,
)


def logits(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_log_softmax_of_known_probabilities_and_of_huge_logits() -> None:
    assert np.exp(log_softmax(logits([1, 2, 5]))) == pytest.approx(np.array([[0.125, 0.25, 0.625]]))
    assert log_softmax(np.array([[1e4, 1e4]], np.float32)) == pytest.approx(math.log(0.5))


def test_kl_divergence_by_hand_and_its_direction() -> None:
    p, q = logits([0.5, 0.5]), logits([0.75, 0.25])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert kl_divergence(q, p)[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert kl_divergence(p, p)[0] == 0.0


def test_kl_divergence_over_more_rows_than_one_piece() -> None:
    rows = np.random.default_rng(0).normal(size=(150, 7)).astype(np.float32)
    other = np.roll(rows, 1, axis=0)
    single = [kl_divergence(rows[i : i + 1], other[i : i + 1])[0] for i in range(150)]
    assert kl_divergence(rows, other) == pytest.approx(np.array(single))


def test_compare_logits_counts_positions_and_largest_difference() -> None:
    reference = [np.array([[0, 1], [3, 0]], np.float32), np.array([[0, -5]], np.float32)]
    other = [np.array([[0, 1], [0, 1]], np.float32), np.array([[0, -5]], np.float32)]
    found = compare_logits(reference, other)
    assert found.max_abs_logit_difference == 3.0
    assert found.largest_logit == 5.0
    assert found.same_top_rate == pytest.approx(2 / 3)
    assert found.positions == 3


def test_compare_logits_never_passes_a_nan_and_refuses_other_shapes() -> None:
    good = [np.zeros((1, 2), np.float32)]
    assert compare_logits(good, [np.array([[np.nan, 0]], np.float32)]).max_abs_logit_difference == np.inf
    with pytest.raises(ValueError, match=r"\(1, 3\), expected \(1, 2\)"):
        compare_logits(good, [np.zeros((1, 3), np.float32)])


def test_tolerance_grows_with_depth_length_and_scale() -> None:
    base = logit_tolerance(10.0, blocks=4, inner=100)
    assert base == pytest.approx(2**-23 * 10 * 10 * 10)
    assert logit_tolerance(20.0, 4, 100) == pytest.approx(2 * base)
    assert logit_tolerance(10.0, 9, 100) == pytest.approx(2 * base)
    assert logit_tolerance(10.0, 4, 400) == pytest.approx(2 * base)


def trace(*rows: list[float]) -> GreedyTrace:
    values = np.array(rows, np.float32)
    return GreedyTrace(tuple(int(i) for i in values.argmax(-1)), values)


def test_greedy_difference_within_the_logit_difference_is_a_tie() -> None:
    found = compare_greedy(trace([3, 0], [1.0, 0.9]), trace([3, 0], [0.9, 1.05]))
    assert (found.equal, found.first_difference, found.tie) == (False, 1, True)
    assert found.margin == pytest.approx(0.1)
    assert found.max_abs_logit_difference == pytest.approx(0.15)


def test_a_margin_is_off_by_more_than_one_logit() -> None:
    found = compare_greedy(trace([1.0, 0.94]), trace([0.95, 0.985]))
    assert found.margin == pytest.approx(0.06) and found.max_abs_logit_difference == pytest.approx(0.05)
    assert found.tie
    found = compare_greedy(trace([1.0, 0.91]), trace([0.945, 0.965]))
    assert found.margin == pytest.approx(0.09) and found.max_abs_logit_difference == pytest.approx(0.055)
    assert not found.tie


def test_greedy_difference_beyond_the_logit_difference_is_no_tie() -> None:
    found = compare_greedy(trace([1.0, 0.0]), trace([0.4, 0.5]))
    assert found.margin == pytest.approx(1.0)
    assert found.max_abs_logit_difference == pytest.approx(0.6)
    assert not found.tie


def test_equal_traces_are_equal_and_ignore_nothing_before_the_end() -> None:
    found = compare_greedy(trace([1, 0], [0, 2]), trace([1, 0], [0, 1.5]))
    assert (found.equal, found.first_difference, found.tie) == (True, 2, False)
    assert found.max_abs_logit_difference == pytest.approx(0.5)
