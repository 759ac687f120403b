"""What training minimises, and how its learning rate runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖output - target‖² / ‖target‖² of [samples, tokens, hidden], without the first.

    Each token counts the same. A few tokens have hidden states hundreds of times larger than the rest, the
    first of a sequence always: in a sum over tokens the loss would be about nothing else.
    """
    error = (output - target)[:, 1:].square().sum(dim=-1)
    return (error / target[:, 1:].square().sum(dim=-1).clamp_min(1e-30)).mean()


def cross_entropy(student: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of logits [b, t, vocab] against `tokens` [b, t]."""
    return nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) per position of logits [b, t, vocab]."""
    log_student = student.flatten(0, 1).log_softmax(dim=-1)
    log_teacher = teacher.flatten(0, 1).log_softmax(dim=-1)
    return nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def learning_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over `warmup` of the steps, then linear decay to 0; `step` counts from 0."""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def require_finite(loss: float, what: str, rate: float) -> None:
    """Raise `GateError` if training has diverged."""
    from losa_deploy.errors import GateError

    if not torch.isfinite(torch.tensor(loss)):
        raise GateError(
            f"The loss of {what} became {loss}.", hint=f"Lower the learning rate of the phase (now {rate:g})."
        )
