"""What training minimises, and how its learning rate runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa_deploy.compress.device import wide_type

POSITIONS = 256
"""Positions whose logits exist at a time: 50 MB in f32 for a vocabulary of 49,152."""


def token_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖output - target‖² / ‖target‖² of [samples, tokens, hidden].

    Each token counts the same: a few have hidden states hundreds of times larger than the rest, and in a sum
    the loss would be about nothing else. The first of a sequence is one of these in most blocks. It counts
    too: all others attend to it, and a block that is free to lose it does so with some texts.
    """
    error = (output - target).square().sum(dim=-1)
    return (error / target.square().sum(dim=-1).clamp_min(1e-30)).mean()


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest next tokens by some model, at each position, and how likely all others are together."""

    tokens: Tensor
    """[…, k] int32."""
    scores: Tensor
    """[…, k] f32: logarithms of their probabilities."""
    rest: Tensor
    """[…] f32: probability of the others, 0 if there are none."""

    def __getitem__(self, rows: slice | Tensor) -> Likeliest:
        return Likeliest(self.tokens[rows], self.scores[rows], self.rest[rows])

    def flat(self, device: torch.device) -> Likeliest:
        """[b, t, …] as [b·t, …] on a device."""
        tokens, scores, rest = (x.to(device).flatten(0, 1) for x in (self.tokens, self.scores, self.rest))
        return Likeliest(tokens, scores, rest)


class _HeadLoss(torch.autograd.Function):
    """Hidden states ↦ loss through a frozen head; the gradient is made in the forward pass.

    So logits exist for a few positions at a time, and each is computed once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        teacher: Tensor | Likeliest | None,
        labels: Tensor,
        head: nn.Linear,
        weights: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        matrix = head.weight.detach().to(dtype)
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        kl = weights[0] / len(hidden)
        ce = weights[1] / max(1, int((labels >= 0).sum()))
        grad, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=wide_type(hidden.device))
        for start in range(0, len(hidden), POSITIONS):
            part = slice(start, start + POSITIONS)
            student = _log_softmax(hidden[part], matrix, bias)
            slope = torch.zeros_like(student)
            if isinstance(teacher, Likeliest) and kl:
                total += kl * _towards_likeliest(student, teacher[part], slope, kl).to(total.dtype)
            elif teacher is not None and kl:
                assert isinstance(teacher, Tensor)
                aim = _log_softmax(teacher[part], matrix, bias)
                chances = aim.exp()
                total += kl * (aim.sub_(student).mul_(chances)).sum(dtype=total.dtype)
                slope += kl * (student.exp() - chances)
            if ce:
                rows = torch.nonzero(labels[part] >= 0)[:, 0]
                wanted = labels[part][rows]
                total -= ce * student[rows, wanted].sum(dtype=total.dtype)
                slope[rows] += ce * student[rows].exp()
                slope[rows, wanted] -= ce
            grad[part] = (slope.to(dtype) @ matrix).to(grad.dtype)
        ctx.save_for_backward(grad)
        return total.to(hidden.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved * grad, None, None, None, None, None


def _towards_likeliest(student: Tensor, teacher: Likeliest, slope: Tensor, kl: float) -> Tensor:
    """KL over the teacher's tokens and all others as one, summed over positions; its gradient is added.

    `student` [n, vocab] are log-probabilities, `slope` [n, vocab] the gradient by logits. Inside of the rest
    the student is free: there the gradient scales its probabilities alike.
    """
    tokens, scores = teacher.tokens.long(), teacher.scores.to(student.dtype)
    own, aim, rest = student.gather(1, tokens), scores.exp(), teacher.rest.to(student.dtype)
    chances = student.exp()
    outside = chances.scatter(1, tokens, 0.0).sum(dim=1).clamp_min(1e-30)
    found: Tensor = (aim * (scores - own)).sum() + torch.special.xlogy(rest, rest / outside).sum()
    factor = (1.0 - rest / outside)[:, None].expand_as(chances).scatter(1, tokens, 1.0)
    slope += kl * chances.mul_(factor)
    slope.scatter_add_(1, tokens, -kl * aim)
    return found


@torch.no_grad()
def likeliest(hidden: Tensor, head: nn.Linear, count: int, dtype: torch.dtype) -> Likeliest:
    """The `count` likeliest next tokens of a model whose head reads `hidden` [n, h]; products in `dtype`."""
    matrix = head.weight.detach().to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    parts = []
    for start in range(0, len(hidden), POSITIONS):
        found = _log_softmax(hidden[start : start + POSITIONS], matrix, bias)
        scores, tokens = found.topk(min(count, found.shape[1]), dim=1)
        rest = found.exp_().scatter_(1, tokens, 0.0).sum(dim=1)
        parts.append((tokens.to(torch.int32), scores.float(), rest.float()))
    return Likeliest(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _log_softmax(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Log-probabilities [n, vocab] of hidden states [n, hidden]; f32 or wider."""
    logits = nn.functional.linear(hidden.to(matrix.dtype), matrix, bias)
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(dim=-1)


def head_loss(
    hidden: Tensor,
    teacher: Tensor | Likeliest | None,
    tokens: Tensor,
    head: nn.Linear,
    *,
    kl: float,
    ce: float,
    dtype: torch.dtype,
) -> Tensor:
    """kl · mean KL(dense ‖ student) per position + ce · mean cross-entropy of the next token.

    `hidden` [b, t, h] is what the head reads in the student; `teacher` the same in the dense model, or what
    that says of [b, t] (None if `kl` is 0); `tokens` [b, t]; `head`, which both share, does not train;
    `dtype` is that of its products.
    """
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1).flatten().to(hidden.device)
    flat = teacher.flatten(0, 1) if isinstance(teacher, Tensor) else teacher
    flat = flat.flat(hidden.device) if isinstance(flat, Likeliest) else flat
    result: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), flat, labels, head, (kl, ce), dtype
    )
    return result


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
