"""Block-wise reconstruction: tune the kept weights of one block to match the dense block's output.

No backward pass leaves the block, so memory is one block and minutes on a CPU suffice
(EBFT, arXiv 2402.12419). On a grid the block learns with its weights rounded, scales included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losa_deploy.compress.decoder import Stream, slices
from losa_deploy.compress.losses import learning_factor, require_finite, token_error
from losa_deploy.compress.precision import products
from losa_deploy.compress.student import Student
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.compress.train import Trained, set_rates
from losa_deploy.phases import PhaseRecipe

ATTEMPTS = 3
"""Learning rates that are tried, each half of the one before, until the block gets better."""
PROBES = (0.5, 1.0, 2.0)
"""Factors of the learning rate that `rate: probe` compares, each with a quarter of the steps."""


@dataclass(frozen=True)
class BlockTask:
    """One block of the student or two neighbours, their inputs, and what they should give."""

    student: Student
    blocks: range
    names: tuple[str, ...]
    """Linears that train: those that are pruned."""
    stream: Stream
    """Before the first of the blocks."""
    target: Tensor
    """[samples, tokens, hidden]: the dense model's output of the last of the blocks."""
    precision: str
    samples: int
    """Of all processes; the stream and the target have those of this one."""
    team: Team = ALONE

    def output(self, part: slice) -> Tensor:
        """The last block's output on a batch; differentiable."""
        found = self.stream.rows(part)
        with products(self.precision, self.student.device):
            for block in self.blocks:
                found = self.student.run_block(block, found, self.stream.arguments[block])
        return found.float()

    def trained(self, phase: PhaseRecipe, factor: float) -> Trained:
        """The parameters that `phase` trains here."""
        linears = [self.student.masked(name) for name in self.names]
        rest = [value for block in self.blocks for value in self.student.rest(block).values()]
        return Trained(linears, phase, rest=rest, factor=factor)

    @torch.no_grad()
    def error(self, rows: slice) -> float:
        """Mean relative error per token of these samples."""
        own, found = self.team.part(rows), torch.zeros((), device=self.target.device)
        for part in slices(own.start, own.stop, self.stream.batch):
            found += self.share(part, rows)
        return float(self.team.total(found))

    def share(self, part: slice, rows: slice) -> Tensor:
        """What a part of this process's samples adds to the mean error per token of `rows`."""
        weight = (part.stop - part.start) / (rows.stop - rows.start)
        error: Tensor = weight * token_error(self.output(part), self.target[part].float())
        return error


def held_out_count(samples: int) -> int:
    """Samples kept from training to judge it: a tenth, at least one when there are two or more."""
    return max(1, samples // 10) if samples > 1 else 0


def reconstruct_block(
    task: BlockTask, phase: PhaseRecipe, steps: int, draw: torch.Generator
) -> tuple[float, float]:
    """Train the block by one phase for `steps` batches of its stream.

    Returns the held-out error before and after. A block that got worse is put back and tried again with
    half the learning rate; after `ATTEMPTS` it stays as it was. Raises `GateError` if the loss is not finite.
    """
    samples = task.samples
    split = samples - held_out_count(samples)
    train = list(slices(0, split, phase.batch_size))
    held = slice(split if split < samples else 0, samples)
    before = task.error(held)
    factor = _probed(task, phase, steps, train, held, draw) if phase.rate == "probe" else 1.0
    for _ in range(ATTEMPTS):
        trained = task.trained(phase, factor)
        start = trained.snapshot()
        _descend(task, phase, trained, steps, train, draw)
        after = task.error(held)
        if not after <= before:
            trained.restore(start)
        trained.release()
        if after <= before:
            return before, after
        factor /= 2
    return before, before


def _probed(
    task: BlockTask,
    phase: PhaseRecipe,
    steps: int,
    train: Sequence[slice],
    held: slice,
    draw: torch.Generator,
) -> float:
    """The factor of the learning rate that lowers the held-out error most in a quarter of the steps."""
    errors: dict[float, float] = {}
    state = draw.get_state()
    for factor in PROBES:
        trained = task.trained(phase, factor)
        start = trained.snapshot()
        draw.set_state(state)
        _descend(task, phase, trained, max(1, steps // 4), train, draw)
        errors[factor] = task.error(held)
        trained.restore(start)
        trained.release()
    draw.set_state(state)
    return min(errors, key=errors.__getitem__)


def _descend(
    task: BlockTask,
    phase: PhaseRecipe,
    trained: Trained,
    steps: int,
    train: Sequence[slice],
    draw: torch.Generator,
) -> None:
    """Adam on the block's error."""
    optimizer = torch.optim.AdamW(
        trained.groups, betas=(0.9, 0.95), weight_decay=phase.weight_decay, fused=True
    )
    order: list[int] = []
    for number in range(steps):
        if not order:
            order = torch.randperm(len(train), generator=draw).tolist()
        part = train[order.pop(0)]
        set_rates(optimizer, learning_factor(number, steps, phase.warmup))
        optimizer.zero_grad(set_to_none=True)
        own, loss = task.team.part(part), torch.zeros((), device=task.target.device)
        if own.start < own.stop:
            loss = phase.losses.block * task.share(own, part)
            loss.backward()  # type: ignore[no-untyped-call]
        task.team.add_gradients(trained.parameters)
        found = float(task.team.total(loss))
        require_finite(found, f"block {task.blocks[-1]}", phase.learning_rate)
        trained.clip(phase.clip)
        trained.step(optimizer)
