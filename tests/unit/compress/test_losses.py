"""What training minimises, and its learning rate, against the definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losa_deploy.compress.losses import cross_entropy, distillation, learning_factor


def logits(seed: int) -> torch.Tensor:
    """[2, 5, 7] f64, spread enough that no two ways to compare distributions agree."""
    return torch.from_numpy(2.0 * np.random.default_rng(seed).standard_normal((2, 5, 7)))


def probabilities(values: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    powers = np.exp(values.numpy())
    return powers / powers.sum(axis=-1, keepdims=True)


def test_cross_entropy_is_that_of_the_next_token() -> None:
    student = logits(0)
    tokens = np.random.default_rng(1).integers(0, 7, (2, 5))
    chances = probabilities(student)
    terms = [-np.log(chances[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(4)]
    assert float(cross_entropy(student, torch.from_numpy(tokens))) == pytest.approx(np.mean(terms), rel=1e-9)


def test_distillation_is_the_divergence_from_teacher_to_student() -> None:
    """KL(teacher ‖ student), not the other way round, as a mean over positions."""
    student, teacher = logits(2), 0.3 * logits(3)
    p, q = probabilities(teacher), probabilities(student)
    expected = (p * np.log(p / q)).sum(axis=-1).mean()
    assert abs(expected - (q * np.log(q / p)).sum(axis=-1).mean()) > 0.1, "the directions differ here"
    assert float(distillation(student, teacher)) == pytest.approx(expected, rel=1e-9)


def test_only_the_student_is_moved_towards_the_teacher() -> None:
    student, teacher = logits(4).requires_grad_(), logits(5)
    before = distillation(student, teacher)
    before.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    closer = student.detach() - 0.1 * student.grad
    assert float(distillation(closer, teacher)) < float(before.detach())
    assert float(distillation(teacher, teacher)) == pytest.approx(0, abs=1e-12)


def test_the_learning_rate_rises_to_its_full_value_and_falls_to_nothing() -> None:
    factors = [learning_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert learning_factor(10, 10, 0.2) == 0
    without = [learning_factor(step, 4, 0.0) for step in range(4)]
    assert without == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])
    assert learning_factor(0, 1, 0.5) == 1.0
