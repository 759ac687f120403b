"""What training minimises, and its learning rate, against the definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losa_deploy.compress.losses import Likeliest, head_loss, learning_factor, likeliest


def logits(seed: int) -> torch.Tensor:
    """[2, 5, 7] f64, spread enough that no two ways to compare distributions agree."""
    return torch.from_numpy(2.0 * np.random.default_rng(seed).standard_normal((2, 5, 7)))


def probabilities(values: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    powers = np.exp(values.numpy())
    return powers / powers.sum(axis=-1, keepdims=True)


def through(
    student: torch.Tensor, teacher: torch.Tensor | None, tokens: torch.Tensor, **weights: float
) -> torch.Tensor:
    """`head_loss` through a head that changes nothing, so that hidden states are logits."""
    head = torch.nn.Linear(7, 7, bias=False).double().requires_grad_(False)
    head.weight.copy_(torch.eye(7))
    return head_loss(student, teacher, tokens, head, dtype=torch.float64, **{"kl": 0.0, "ce": 0.0, **weights})


def test_cross_entropy_is_that_of_the_next_token() -> None:
    student = logits(0)
    tokens = np.random.default_rng(1).integers(0, 7, (2, 5))
    chances = probabilities(student)
    terms = [-np.log(chances[b, t, tokens[b, t + 1]]) for b in range(2) for t in range(4)]
    found = through(student, None, torch.from_numpy(tokens), ce=1.0)
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-9)


def test_distillation_is_the_divergence_from_teacher_to_student() -> None:
    """KL(teacher ‖ student), not the other way round, as a mean over positions."""
    student, teacher = logits(2), 0.3 * logits(3)
    p, q = probabilities(teacher), probabilities(student)
    expected = (p * np.log(p / q)).sum(axis=-1).mean()
    assert abs(expected - (q * np.log(q / p)).sum(axis=-1).mean()) > 0.1, "the directions differ here"
    found = through(student, teacher, torch.zeros(2, 5, dtype=torch.int64), kl=1.0)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_only_the_student_is_moved_towards_the_teacher() -> None:
    student, teacher = logits(4).requires_grad_(), logits(5)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    before = through(student, teacher, tokens, kl=1.0)
    before.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    closer = student.detach() - 0.1 * student.grad
    assert float(through(closer, teacher, tokens, kl=1.0)) < float(before.detach())
    assert float(through(teacher, teacher, tokens, kl=1.0)) == pytest.approx(0, abs=1e-12)


def by_autograd(
    student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, kl: float, ce: float
) -> torch.Tensor:
    """The same loss of whole logits, with torch's own functions."""
    functions = torch.nn.functional
    aim, found = (x.flatten(0, 1).log_softmax(dim=-1) for x in (teacher, student))
    divergence = functions.kl_div(found, aim, log_target=True, reduction="batchmean")
    return kl * divergence + ce * functions.cross_entropy(
        student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_the_loss_through_the_head_is_that_of_its_logits(kl: float, ce: float, bias: bool) -> None:
    """Value and gradient, over more positions than are computed at a time."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=bias).double().requires_grad_(False)
    hidden, teacher = (torch.randn(3, 200, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tokens = torch.randint(11, (3, 200))
    known = teacher.detach() if kl else None
    loss = head_loss(hidden, known, tokens, head, kl=kl, ce=ce, dtype=torch.float64)
    (2.0 * loss).backward()  # type: ignore[no-untyped-call]
    found, hidden.grad = hidden.grad, None
    expected = by_autograd(head(hidden), head(teacher).detach(), tokens, kl, ce)
    (2.0 * expected).backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert found is not None
    assert hidden.grad is not None
    assert torch.allclose(found, hidden.grad, rtol=1e-9, atol=1e-15)


def test_products_in_bf16_move_the_loss_through_the_head_by_their_rounding() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False).requires_grad_(False)
    hidden, teacher = torch.randn(2, 300, 64) * 4, torch.randn(2, 300, 64) * 4
    tokens = torch.randint(500, (2, 300))
    exact, near = (
        float(head_loss(hidden, teacher, tokens, head, kl=1.0, ce=0.5, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact != near
    assert near == pytest.approx(exact, rel=0.01)


def test_the_learning_rate_rises_to_its_full_value_and_falls_to_nothing() -> None:
    factors = [learning_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert learning_factor(10, 10, 0.2) == 0
    without = [learning_factor(step, 4, 0.0) for step in range(4)]
    assert without == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])
    assert learning_factor(0, 1, 0.5) == 1.0


def both(seed: int) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head of 11 tokens, states of student and teacher over more than one part, and tokens."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(6, 11).double().requires_grad_(False)
    hidden, teacher = (torch.randn(3, 200, 6, dtype=torch.float64) for _ in range(2))
    return head, hidden.requires_grad_(), teacher, torch.randint(11, (3, 200))


def noted(teacher: torch.Tensor, head: torch.nn.Linear, count: int) -> Likeliest:
    found = likeliest(teacher.flatten(0, 1), head, count, torch.float64)
    return Likeliest(*(x.unflatten(0, teacher.shape[:2]) for x in (found.tokens, found.scores, found.rest)))


@pytest.mark.parametrize("count", [1, 4, 11, 50])
def test_the_likeliest_tokens_teach_with_all_others_as_one(count: int) -> None:
    """Value and gradient against torch's own of distributions over count + 1 events."""
    head, hidden, teacher, tokens = both(count)
    known = noted(teacher, head, count)
    assert known.tokens.shape == (3, 200, min(count, 11))
    loss = head_loss(hidden, known, tokens, head, kl=0.7, ce=0.2, dtype=torch.float64)
    (2.0 * loss).backward()  # type: ignore[no-untyped-call]
    found, hidden.grad = hidden.grad, None
    aim, student = (head(states).softmax(dim=-1) for states in (teacher, hidden))
    order = aim.argsort(dim=-1, descending=True)
    events = [
        torch.cat([sorted_[..., :count], sorted_[..., count:].sum(dim=-1, keepdim=True)], dim=-1)
        for sorted_ in (aim.gather(-1, order), student.gather(-1, order))
    ]
    divergence = torch.special.xlogy(events[0], events[0]) - torch.special.xlogy(events[0], events[1])
    cross = torch.nn.functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = 0.7 * divergence.sum(dim=-1).mean() + 0.2 * cross
    (2.0 * expected).backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert found is not None and hidden.grad is not None
    assert torch.allclose(found, hidden.grad, rtol=1e-5, atol=1e-9)


def test_more_tokens_come_closer_to_the_whole_distribution_from_below() -> None:
    head, hidden, teacher, tokens = both(3)
    exact, *few = (
        float(head_loss(hidden.detach(), aim, tokens, head, kl=1.0, ce=0.0, dtype=torch.float64))
        for aim in (teacher, *(noted(teacher, head, count) for count in (1, 3, 6, 11)))
    )
    assert few == sorted(few) and few[0] < 0.9 * exact
    assert few[-1] == pytest.approx(exact, rel=1e-6)
