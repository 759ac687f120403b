"""Phases through the whole model: masked adapters, or the kept weights with or without a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from losa_deploy.compress.data import Batches
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import wide_type
from losa_deploy.compress.losses import Likeliest, head_loss, learning_factor, require_finite
from losa_deploy.compress.optimizer import (
    moments,
    new_optimizer,
    optimizer_on,
    restore_moments,
    saved_kind,
)
from losa_deploy.compress.partial import Partial, Point
from losa_deploy.compress.points import Points
from losa_deploy.compress.precision import products, uses_bf16
from losa_deploy.compress.student import Student
from losa_deploy.compress.teacher import Cached, Teacher
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.compress.train import Trained, local, set_rates
from losa_deploy.phases import PhaseRecipe

MICRO_TOKENS = 512
"""Tokens whose activations are in memory together where only norms and biases train."""
PROBES = (0.5, 1.0, 2.0)
PROBE_SHARE = 20
"""`rate: probe` compares these factors of the learning rate, each for a twentieth of the steps."""


@dataclass(frozen=True)
class ModelTask:
    """What a phase trains and by what; `student` is changed, `dense` is read."""

    student: Student
    dense: Decoder
    names: tuple[str, ...]
    """Linears whose weights, scales or adapters may train: none where blocks are opened one at a time."""
    tokens: Tensor
    """[n, length] int64."""
    phase: PhaseRecipe
    steps: int
    precision: str
    seed: int
    labels: tuple[str | int, ...]
    """What the random numbers of this phase depend on besides the seed."""
    recompute: bool = False
    """Blocks are computed a second time in the backward pass: memory for time."""
    teacher: Teacher = None
    """What is known of `dense` and this process's `tokens`; `dense` runs if it is nothing."""
    team: Team = ALONE
    """Each of its processes computes a part of every batch; all take the same step."""
    sharded: bool = False
    """Each has some rows of every parameter of the blocks, see `sharded`."""


def tune(task: ModelTask, partial: Partial, report: Callable[[int], None]) -> tuple[float, ...]:
    """Train for `task.steps` optimizer steps, going on where `partial` was saved; the mask never changes.

    Returns the loss of each step. Raises `GateError` if one is not finite.
    """
    points = Points(partial, task.team, sharded=task.sharded)
    saved = points.saved(task.labels)
    factor = saved.factor if saved else _factor(task)
    trained = _trained(task, factor)
    optimizer = _optimizer(task, trained, saved)
    losses = list(saved.losses) if saved else []
    if saved:
        _resume(trained, optimizer, saved)
    batches = Batches(task.tokens.shape[0], task.phase.batch_size, task.seed, *task.labels)
    # Dropout draws from the global generator: reseeded, it does not depend on where a run was resumed.
    for number in range(len(losses), task.steps):
        torch.manual_seed(task.seed * 1_000_003 + number + task.team.rank * 1_000_000_007)
        set_rates(optimizer, learning_factor(number, task.steps, task.phase.warmup))
        losses.append(_step(task, trained, optimizer, batches[number]))
        require_finite(losses[-1], f"step {number + 1} of {task.steps}", task.phase.learning_rate)
        report(number + 1)
        if points.due():
            points.save(lambda: _point(task, trained, optimizer, factor, losses))
    trained.release()
    return tuple(losses)


def sequences_read(
    count: int, phase: PhaseRecipe, steps: int, seed: int, labels: tuple[str | int, ...], team: Team
) -> list[int]:
    """Which of `count` sequences `tune` reads in this process, ascending."""
    found: set[int] = {min(team.rank, count - 1)} if team.count > 1 else set()  # of a process without a part
    kinds = [(labels, steps)]
    if phase.rate == "probe":
        kinds.append(((*labels, "probe"), _probe_steps(steps) + 1))
    for names, number in kinds:
        batches = Batches(count, phase.batch_size, seed, *names)
        for batch in range(number):
            found.update(team.mine(batches[batch]))
    return sorted(found)


def _probe_steps(steps: int) -> int:
    return max(2, steps // PROBE_SHARE)


def _trained(task: ModelTask, factor: float) -> Trained:
    student = task.student
    rest = [p for block in (*range(len(student.blocks)), None) for p in student.rest(block).values()]
    linears = [student.masked(name) for name in task.names]
    team = task.team if task.sharded else ALONE
    return Trained(linears, task.phase, rest=rest, factor=factor, team=team)


def _optimizer(task: ModelTask, trained: Trained, saved: Point | None = None) -> torch.optim.Optimizer:
    """Of the kind that left `saved`, if there is a point."""
    kind = saved_kind(saved.tensors) if saved else optimizer_on(task.phase.optimizer, task.student.device)
    return new_optimizer("adamw" if task.sharded else kind, trained.groups, task.phase.weight_decay)


def _step(task: ModelTask, trained: Trained, optimizer: torch.optim.Optimizer, batch: list[int]) -> float:
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for part, share in _parts(task, batch):
        if task.student.is_open(0):
            loss = share * _loss(task, part)
            # What is shared out comes as the mean over the processes, the rest is made one below.
            (loss * _divisor(task)).backward()  # type: ignore[no-untyped-call]
        else:
            loss = _descend_by_block(task, part, share)
        total += loss.detach().cpu()
    whole = [parameter for parameter in trained.parameters if parameter is local(parameter)]
    task.team.add_gradients(whole)
    for parameter in whole if task.sharded else ():
        assert parameter.grad is not None
        parameter.grad /= _divisor(task)
    trained.clip(task.phase.clip)
    trained.step(optimizer)
    return float(task.team.total(total.to(task.student.device, wide_type(task.student.device))))


def _divisor(task: ModelTask) -> int:
    return task.team.count if task.sharded else 1


def _parts(task: ModelTask, batch: list[int]) -> list[tuple[list[int], float]]:
    """This process's pieces of a batch, and their shares of it.

    Processes that share out parameters compute together: one without a sequence takes one that counts 0.
    """
    parts = [(part, len(part) / len(batch)) for part in _micro_batches(task, task.team.mine(batch))]
    idle = min(task.team.rank, task.tokens.shape[0] - 1)
    return [([idle], 0.0)] if task.sharded and not parts else parts


def _micro_batches(task: ModelTask, batch: list[int]) -> list[list[int]]:
    """The batch in pieces; whole where weights train, which are rounded anew for each piece."""
    if set(task.phase.train) != {"norms"}:
        return [batch] if batch else []
    size = max(1, MICRO_TOKENS // task.tokens.shape[1])
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _descend_by_block(task: ModelTask, batch: list[int], share: float) -> Tensor:
    """`share` of the loss of `batch`, and gradients of the norms and biases, with one block in memory.

    Blocks are computed twice, the second time from the last to the first.
    """
    student, precision = task.student, task.precision
    stream = student.stream(task.tokens[batch], len(batch))
    inputs: list[Tensor] = []
    for block in range(len(student.blocks)):
        inputs.append(stream.hidden.float())
        stream = student.advance(block, stream, precision)
    output = stream.hidden.float().requires_grad_(True)
    with products(precision, student.device):
        found = student.last_norm(output)
    loss = share * _head_loss(task, batch, found.float())
    loss.backward()  # type: ignore[no-untyped-call]
    for block in reversed(range(len(student.blocks))):
        grad, start = output.grad, inputs.pop().requires_grad_(True)
        with student.open(block), products(precision, student.device):
            found = student.run_block(block, start, stream.arguments[block])
            found.backward(grad)  # type: ignore[no-untyped-call]
        output = start
    return loss


def _loss(task: ModelTask, batch: list[int]) -> Tensor:
    """The loss of the sequences `batch`."""
    return _head_loss(
        task, batch, task.student.features(task.tokens[batch], task.precision, recompute=task.recompute)
    )


def _whole_loss(task: ModelTask, batch: list[int]) -> float:
    """The loss of sequences that the processes have parts of."""
    found = torch.zeros((), device=task.student.device)
    for part, share in _parts(task, batch):
        found += share * _loss(task, part)
    return float(task.team.total(found))


def _head_loss(task: ModelTask, batch: list[int], hidden: Tensor) -> Tensor:
    """The loss of the sequences `batch`, of which the head reads `hidden` [batch, tokens, hidden]."""
    weights, tokens = task.phase.losses, task.tokens[batch]
    teacher = _teacher(task, batch) if weights.kl else None
    dtype = torch.bfloat16 if uses_bf16(task.precision, task.student.device) else torch.float32
    return head_loss(hidden, teacher, tokens, task.student.head, kl=weights.kl, ce=weights.ce, dtype=dtype)


def _teacher(task: ModelTask, batch: list[int]) -> Tensor | Likeliest:
    """What the dense model's head reads of the sequences `batch`, or what it says of them."""
    known = task.teacher
    if isinstance(known, Cached):
        return known.of(batch)
    if known is not None:
        own = [task.team.place(index) for index in batch]
        return known[torch.tensor(own, device=known.device)]
    with torch.no_grad():
        return task.dense.features(task.tokens[batch], task.precision)


def _factor(task: ModelTask) -> float:
    """1, or with `rate: probe` the factor with the lowest loss on a batch that the probes do not train on."""
    if task.phase.rate != "probe":
        return 1.0
    steps = _probe_steps(task.steps)
    batches = Batches(task.tokens.shape[0], task.phase.batch_size, task.seed, *task.labels, "probe")
    losses: dict[float, float] = {}
    for factor in PROBES:
        trained = _trained(task, factor)
        start, optimizer = trained.snapshot(), _optimizer(task, trained)
        for number in range(1, steps + 1):
            set_rates(optimizer, learning_factor(number, steps + 1, task.phase.warmup))
            _step(task, trained, optimizer, batches[number])
        with torch.no_grad():
            losses[factor] = _whole_loss(task, batches[0])
        trained.restore(start)
        trained.release()
    return min(losses, key=losses.__getitem__)


def _point(
    task: ModelTask, trained: Trained, optimizer: torch.optim.Optimizer, factor: float, losses: list[float]
) -> Point:
    """Everything that training needs to go on."""
    values = {f"{i}.value": local(value.detach()).cpu() for i, value in enumerate(trained.parameters)}
    tensors = {**values, **moments(optimizer, trained.parameters)}
    return Point(task.labels, factor, tuple(losses), tensors)


@torch.no_grad()
def _resume(trained: Trained, optimizer: torch.optim.Optimizer, saved: Point) -> None:
    for index, parameter in enumerate(trained.parameters):
        local(parameter.detach()).copy_(saved.tensors[f"{index}.value"])
    restore_moments(optimizer, trained.parameters, saved.tensors, len(saved.losses))
