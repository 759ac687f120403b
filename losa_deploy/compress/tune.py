"""Phases through the whole model: masked adapters, or the kept weights with or without a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa_deploy.compress.data import Batches
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.losses import cross_entropy, distillation, learning_factor, require_finite
from losa_deploy.compress.partial import Partial, Point
from losa_deploy.compress.train import Trained, set_rates
from losa_deploy.phases import PhaseRecipe

LOGIT_BUDGET = 1 << 26
"""Most logits (tokens × vocabulary) of one backward pass: 256 MiB in f32 per copy."""
PROBES = (0.5, 1.0, 2.0)
PROBE_SHARE = 20
"""`rate: probe` compares these factors of the learning rate, each for a twentieth of the steps."""


@dataclass(frozen=True)
class ModelTask:
    """What a phase trains and by what; `student` is changed, `dense` is read."""

    student: Decoder
    dense: Decoder
    names: tuple[str, ...]
    """Linears that train."""
    tokens: Tensor
    """[n, length] int64."""
    phase: PhaseRecipe
    steps: int
    precision: str
    seed: int
    labels: tuple[str | int, ...]
    """What the random numbers of this phase depend on besides the seed."""


def tune(task: ModelTask, partial: Partial, report: Callable[[int], None]) -> tuple[float, ...]:
    """Train for `task.steps` optimizer steps, going on where `partial` was saved; the mask never changes.

    Returns the loss of each step. Raises `GateError` if one is not finite.
    """
    saved = partial.point(task.labels)
    factor = saved.factor if saved else _factor(task)
    trained = _trained(task, factor)
    optimizer = _optimizer(trained, task.phase)
    losses = list(saved.losses) if saved else []
    if saved:
        _resume(trained, optimizer, saved)
    batches = Batches(task.tokens.shape[0], task.phase.batch_size, task.seed, *task.labels)
    # Dropout draws from the global generator: reseeded, it does not depend on where a run was resumed.
    for number in range(len(losses), task.steps):
        torch.manual_seed(task.seed * 1_000_003 + number)
        set_rates(optimizer, learning_factor(number, task.steps, task.phase.warmup))
        losses.append(_step(task, trained, optimizer, task.tokens[batches[number]]))
        require_finite(losses[-1], f"step {number + 1} of {task.steps}", task.phase.learning_rate)
        report(number + 1)
        if partial.due():
            partial.save_point(_point(task, trained, optimizer, factor, losses))
    trained.release()
    return tuple(losses)


def _trained(task: ModelTask, factor: float) -> Trained:
    return Trained([task.student.masked(name) for name in task.names], task.phase, factor=factor)


def _optimizer(trained: Trained, phase: PhaseRecipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained.groups, weight_decay=phase.weight_decay)


def _step(task: ModelTask, trained: Trained, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = _backward(task, batch)
    nn.utils.clip_grad_norm_(trained.parameters, task.phase.clip)
    optimizer.step()
    return loss


def _backward(task: ModelTask, batch: Tensor) -> float:
    """Accumulate the gradient of the batch's mean loss in pieces that bound the logits' memory."""
    vocabulary = int(task.student.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    piece = max(1, LOGIT_BUDGET // (batch.shape[1] * vocabulary))
    total = 0.0
    for part in torch.split(batch, piece):
        share = part.shape[0] / batch.shape[0]
        loss = _loss(task, part)
        (loss * share).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * share
    return total


def _loss(task: ModelTask, tokens: Tensor) -> Tensor:
    weights = task.phase.losses
    logits = task.student.logits(tokens, task.precision)
    loss = logits.new_zeros(())
    if weights.kl:
        with torch.no_grad():
            teacher = task.dense.logits(tokens, task.precision)
        loss = loss + weights.kl * distillation(logits, teacher)
    if weights.ce:
        loss = loss + weights.ce * cross_entropy(logits, tokens)
    return loss


def _factor(task: ModelTask) -> float:
    """1, or with `rate: probe` the factor with the lowest loss on a batch that the probes do not train on."""
    if task.phase.rate != "probe":
        return 1.0
    steps = max(2, task.steps // PROBE_SHARE)
    batches = Batches(task.tokens.shape[0], task.phase.batch_size, task.seed, *task.labels, "probe")
    losses: dict[float, float] = {}
    for factor in PROBES:
        trained = _trained(task, factor)
        start, optimizer = trained.snapshot(), _optimizer(trained, task.phase)
        for number in range(1, steps + 1):
            set_rates(optimizer, learning_factor(number, steps + 1, task.phase.warmup))
            _step(task, trained, optimizer, task.tokens[batches[number]])
        with torch.no_grad():
            losses[factor] = float(_loss(task, task.tokens[batches[0]]))
        trained.restore(start)
        trained.release()
    return min(losses, key=losses.__getitem__)


def _point(
    task: ModelTask, trained: Trained, optimizer: torch.optim.Optimizer, factor: float, losses: list[float]
) -> Point:
    """Everything that training needs to go on."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(trained.parameters):
        tensors[f"{index}.value"] = parameter.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{index}.{key}"] = optimizer.state[parameter][key]
    return Point(task.labels, factor, tuple(losses), tensors)


@torch.no_grad()
def _resume(trained: Trained, optimizer: torch.optim.Optimizer, saved: Point) -> None:
    for index, parameter in enumerate(trained.parameters):
        parameter.copy_(saved.tensors[f"{index}.value"])
        state = {key: saved.tensors[f"{index}.{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(len(saved.losses))), **state}
