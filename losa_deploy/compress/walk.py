"""One pass through the blocks: prune each on the stream of the already pruned ones, measure, repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from losa_deploy.compress import adapted
from losa_deploy.compress.block_pruning import input_statistics, prune_block
from losa_deploy.compress.decoder import Decoder, Stream, batch_size
from losa_deploy.compress.grid import GridKind
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.prune import InputStatistics
from losa_deploy.compress.reconstruct import BlockTask, reconstruct_block
from losa_deploy.compress.seeds import generator
from losa_deploy.compress.student import StoredBlock, Student
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.manifest import GridRecord, Record
from losa_deploy.phases import PhaseRecipe
from losa_deploy.progress import Progress
from losa_deploy.recipe import Recipe

REST = "rest:"
"""Before the names of norms and biases in the file of a finished block."""


@dataclass(frozen=True)
class Walk:
    """What a pass needs to know; `student` is changed, `dense` is read."""

    student: Student
    dense: Decoder
    masked: frozenset[str]
    recipe: Recipe
    step: int
    label: str
    progress: Progress
    partial: Partial
    team: Team = ALONE
    """Each of its processes has the streams of its own samples, and all have the same student."""
    samples: int = 0
    """Of all processes together."""

    @property
    def phases(self) -> list[tuple[int, PhaseRecipe]]:
        """Block phases of this step, with their numbers in the recipe."""
        last = self.step == self.recipe.schedule.steps
        numbered = enumerate(self.recipe.phases)
        return [(i, phase) for i, phase in numbered if phase.where == "blocks" and phase.runs(last=last)]

    @property
    def window(self) -> int:
        """The most blocks that train together."""
        return max((phase.window for _, phase in self.phases), default=1)


@dataclass(frozen=True)
class BlockResult:
    """A finished block."""

    error: float
    """See `block_error`."""
    trained: tuple[tuple[float, float], ...]
    """Held-out error before and after each of the walk's phases."""
    kept: int
    """Kept positions of its prunable linears."""


def walk_blocks(
    walk: Walk, tokens: Tensor, rates: NDArray[np.float64], kept: Sequence[int] | None
) -> tuple[list[BlockResult], Stream]:
    """Prune every block to its rate (or its N of every M in `kept`), train it, and go on from its output.

    A block is trained before the stream moves on, so that later masks see repaired activations. Blocks
    that an interrupted run had finished are taken from `walk.partial`. Returns the results and the dense
    model's stream after the last block. `tokens` are those of all processes.
    """
    walk = replace(walk, samples=tokens.shape[0])
    tokens = walk.team.rows(tokens)
    batch = batch_size(tokens.shape[0])
    ours, dense = walk.student.stream(tokens, batch), walk.dense.stream(tokens, batch)
    count = len(walk.student.blocks)
    results = finished_blocks(walk.partial)[:count]
    walk.team.wait()
    if walk.team.leads:
        walk.partial.forget_blocks(len(results))
    earlier = ours
    for block in range(count):
        with walk.dense.open(block):
            dense = walk.dense.advance(block, dense, walk.recipe.precision)
            if block < len(results):
                earlier, ours = ours, walk.student.advance(block, ours, walk.recipe.precision)
            else:
                kept_here = kept[block] if kept is not None else 0
                place = Place(block, earlier, ours, dense)
                result, earlier, ours = _make_block(walk, place, float(rates[block]), kept_here)
                results.append(result)
        walk.progress(block + 1, count, walk.label)
    return results, dense


@dataclass(frozen=True)
class Place:
    """Where a walk is."""

    block: int
    earlier: Stream
    """The student's before the block before this one."""
    ours: Stream
    """The student's before this block."""
    dense: Stream
    """The dense model's after this block."""


def _make_block(walk: Walk, place: Place, rate: float, kept: int) -> tuple[BlockResult, Stream, Stream]:
    """Prune and train one block, which the dense model has open, and save it.

    Returns the result and the student's streams before and after the block.
    """
    precision, block, ours, dense = walk.recipe.precision, place.block, place.ours, place.dense
    reference = walk.dense.advance(block, ours, precision) if _needs_local_error(walk.recipe) else dense
    changed = range(max(0, block + 1 - walk.window), block + 1)
    with walk.student.open(*changed):
        statistics = input_statistics(walk, block, ours)
        prune_block(walk, block, statistics, rate, kept)
        trained, ours = _train_block(walk, place, statistics)
        walk.team.agree(_values(walk.student, changed))
        after = walk.student.advance(block, ours, precision)
        masks = [walk.student.masked(n).mask for n in walk.student.block_linears(block) if n in walk.masked]
        result = BlockResult(
            block_error(after, reference, walk.team),
            tuple(trained),
            sum(int(mask.sum()) for mask in masks),
        )
        if walk.team.leads:
            _save(walk, block, changed, result)
        walk.team.wait()
    return result, ours, after


def _values(student: Student, blocks: Iterable[int]) -> list[Tensor]:
    """Everything in open blocks that a walk changes."""
    linears = [student.masked(name) for block in blocks for name in student.block_linears(block)]
    found = [value for each in linears for value in (each.mask, each.weight, each.scales)]
    return [*found, *(value for block in blocks for value in student.rest(block).values())]


def _save(walk: Walk, block: int, changed: Sequence[int], result: BlockResult) -> None:
    """Save a finished block, and those before it that trained with it."""
    student = walk.student
    names = [name for index in changed for name in student.block_linears(index)]
    record = {
        "error": result.error,
        "trained": [list(pair) for pair in result.trained],
        "kept": result.kept,
        "blocks": list(changed),
        "scales": {n: student.masked(n).scale for n in names if student.masked(n).rank},
        "grids": {n: g.model_dump() for n, g in adapted.grid_records(student, names).items()},
    }
    tensors: dict[str, Tensor] = {}
    for index in changed:
        tensors |= adapted.block_tensors(student, index)
        if adapted.trains_rest(walk.recipe):
            tensors |= {f"{REST}{name}": value.data.cpu() for name, value in student.rest(index).items()}
    walk.partial.save_block(block, tensors, record)


def _train_block(
    walk: Walk, place: Place, statistics: Mapping[str, InputStatistics]
) -> tuple[list[tuple[float, float]], Stream]:
    """The block phases, one after the other.

    Returns the held-out error before and after each, and the student's stream before the block, which
    changes if the block before it trains too. That one keeps the grid it is on.
    """
    student, block, ours = walk.student, place.block, place.ours
    names = student.block_linears(block)
    errors: list[tuple[float, float]] = []
    for number, phase in walk.phases:
        settle_grid([student.masked(name) for name in names], phase, [statistics[n] for n in names])
        blocks = range(max(0, block + 1 - phase.window), block + 1)
        trained = [name for index in blocks for name in student.block_linears(index) if name in walk.masked]
        start = place.earlier if len(blocks) > 1 else ours
        task = BlockTask(
            student, blocks, tuple(trained), start, place.dense.hidden, walk.recipe.precision,
            walk.samples, walk.team,
        )  # fmt: skip
        steps = phase.steps(walk.samples, ours.hidden.shape[1], last=walk.step == walk.recipe.schedule.steps)
        draw = generator(walk.recipe.seed, "reconstruct", walk.step, block, number)
        errors.append(reconstruct_block(task, phase, steps, draw))
        for name in {*names, *trained}:
            student.masked(name).settle()
        if len(blocks) > 1:
            ours = student.advance(block - 1, place.earlier, walk.recipe.precision)
    return errors, ours


def settle_grid(
    linears: Sequence[MaskedLinear],
    phase: PhaseRecipe,
    statistics: Sequence[InputStatistics | None],
) -> None:
    """Put linears on the grid of a phase, or take them off theirs; those already on it stay."""
    kind = grid_of(phase)
    for linear, seen in zip(linears, statistics, strict=True):
        if linear.grid != kind:
            linear.leave_grid()
            if kind is not None:
                linear.put_on_grid(kind, None if seen is None else seen.squares / max(1, seen.count))


def grid_of(phase: PhaseRecipe) -> GridKind | None:
    """The grid of a phase, None for weights that may have any value."""
    return None if phase.grid == "none" else GridKind.of(phase.grid, phase.group_size)


class FinishedBlock(Record):
    """What is recorded beside the tensors of a finished block."""

    step: int
    sha256: str
    error: float
    trained: tuple[tuple[float, float], ...]
    kept: int
    blocks: tuple[int, ...]
    """Those in the file: it, and the ones that trained with it."""
    scales: dict[str, float]
    grids: dict[str, GridRecord]


def finished_blocks(partial: Partial) -> list[BlockResult]:
    """What a step that was interrupted had finished; a record of another version ends it."""
    results: list[BlockResult] = []
    for record in partial.blocks():
        try:
            saved = FinishedBlock.model_validate(record)
        except ValidationError:
            break
        results.append(BlockResult(saved.error, saved.trained, saved.kept))
    return results


def finished_block(partial: Partial, student: Student, block: int) -> StoredBlock | None:
    """A block as the unfinished step left it: in its own file, or in that of the next, which changed it."""
    prefix = f"{student.family.blocks}.{block}."
    for holder in (block + 1, block):
        record = partial.block(holder)
        if record is None:
            continue
        saved = FinishedBlock.model_validate(record)
        if block in saved.blocks:
            tensors = adapted.read_tensors(partial.block_file(holder))
            own = {name: value for name, value in tensors.items() if name.startswith(prefix)}
            marked = f"{REST}{prefix}"
            rest = {n.removeprefix(REST): value for n, value in tensors.items() if n.startswith(marked)}
            return StoredBlock(adapted.linears_of(own, saved.scales, saved.grids), rest)
    return None


def _needs_local_error(recipe: Recipe) -> bool:
    adapters = any("adapters" in phase.train for phase in recipe.phases)
    return adapters and recipe.rank.method == "error" and recipe.rank.error == "local"


def block_error(output: Stream, dense: Stream, team: Team = ALONE) -> float:
    """LoSA's L_i: mean over channels of ‖dense - output‖² / ‖dense‖² over all tokens."""
    difference, scale = output.rows(slice(0)).new_zeros(2, output.hidden.shape[-1])
    for part in output.batches():
        ours, wanted = output.rows(part).flatten(0, -2), dense.rows(part).flatten(0, -2)
        difference += (wanted - ours).square().sum(dim=0)
        scale += wanted.square().sum(dim=0)
    team.add((difference, scale))
    return float((difference / scale.clamp_min(1e-30)).mean())
