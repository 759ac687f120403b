"""Global adaptation: train masked adapters, or the kept weights themselves, through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.reconstruct import freeze_pruned, kept_rms, learning_factor, release
from losa_deploy.errors import GateError
from losa_deploy.recipe import AdaptRecipe

LOGIT_BUDGET = 1 << 26
"""Most logits (tokens × vocabulary) of one backward pass: 256 MiB in f32 per copy."""


def cross_entropy(student: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of logits [b, t, vocab] against `tokens` [b, t]."""
    return nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) per position of logits [b, t, vocab]."""
    log_student = student.flatten(0, 1).log_softmax(dim=-1)
    log_teacher = teacher.flatten(0, 1).log_softmax(dim=-1)
    return nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")


def _parameters(
    linears: list[MaskedLinear], recipe: AdaptRecipe
) -> tuple[list[dict[str, object]], list[torch.utils.hooks.RemovableHandle]]:
    """Parameter groups of the mode, and the hooks that keep gradients inside the mask."""
    if recipe.mode == "direct":
        handles = freeze_pruned(linears)
        groups: list[dict[str, object]] = [
            {"params": [m.weight], "lr": recipe.learning_rate * kept_rms(m)} for m in linears
        ]
        return groups, handles
    adapters = [p for m in linears if m.rank for p in (m.lora_a, m.lora_b)]
    for parameter in adapters:
        parameter.requires_grad_(True)
    return [{"params": adapters, "lr": recipe.learning_rate}], []


def tune(
    student: Decoder,
    dense: Decoder,
    tokens: Tensor,
    recipe: AdaptRecipe,
    steps: int,
    draw: torch.Generator,
    report: Callable[[int], None],
) -> list[float]:
    """Train for `steps` optimizer steps of `recipe.batch_size` sequences of `tokens` [n, t].

    Mode `adapters` trains A and B of every masked adapter (LoSA), `direct` the kept weights; the
    mask never changes. Returns the loss of each step; raises `GateError` if it is not finite.
    """
    linears = [student.masked(name) for name in student.names]
    groups, handles = _parameters(linears, recipe)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_factor(step, steps, recipe.warmup)
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    order: list[int] = []
    for number in range(steps):
        while len(order) < recipe.batch_size:
            order += torch.randperm(tokens.shape[0], generator=draw).tolist()
        batch, order = tokens[order[: recipe.batch_size]], order[recipe.batch_size :]
        optimizer.zero_grad(set_to_none=True)
        losses.append(_backward(student, dense, batch, recipe.loss))
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise GateError(
                f"The loss became {losses[-1]} at step {number + 1} of {steps}.",
                hint=f"Lower adapt.learning_rate (now {recipe.learning_rate:g}).",
            )
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        report(number + 1)
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    release(linears, handles)
    return losses


def _backward(student: Decoder, dense: Decoder, batch: Tensor, kind: str) -> float:
    """Accumulate the gradient of the batch's mean loss in pieces that bound the logits' memory."""
    vocabulary = int(student.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    piece = max(1, LOGIT_BUDGET // (batch.shape[1] * vocabulary))
    total = 0.0
    for part in torch.split(batch, piece):
        logits = student.logits(part)
        if kind == "kd":
            with torch.no_grad():
                teacher = dense.logits(part)
            loss = distillation(logits, teacher)
        else:
            loss = cross_entropy(logits, part)
        share = part.shape[0] / batch.shape[0]
        (loss * share).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * share
    return total
