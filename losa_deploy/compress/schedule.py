"""LoSA's outer loop: T alternations of allocating, pruning and adapting."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial as partial_call
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losa_deploy.compress import adapted, allocate
from losa_deploy.compress.adapted import AdaptedModel, AdaptedState
from losa_deploy.compress.calibrate import tokens_of_run
from losa_deploy.compress.check import check_unpruned
from losa_deploy.compress.data import phase_tokens
from losa_deploy.compress.decoder import Decoder, Stream, batch_size
from losa_deploy.compress.device import CPU, HERE, Room
from losa_deploy.compress.estimate import Geometry, memory_is_short, part_of, stream_room, teacher_room
from losa_deploy.compress.importance import block_gram, block_importance, linear_cka
from losa_deploy.compress.memory import (
    FROZEN_BYTES,
    LIBRARY_BYTES,
    all_parameters,
    available_bytes,
    fits_at_once,
    trains_whole,
)
from losa_deploy.compress.optimizer import settled
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.precision import STORED
from losa_deploy.compress.prune import kept_of_group
from losa_deploy.compress.seeds import generator
from losa_deploy.compress.sharded import collect, shared_out, take_up
from losa_deploy.compress.streams import Streams
from losa_deploy.compress.student import StoredBlock, Student
from losa_deploy.compress.teacher import (
    Teacher,
    cached,
    from_states,
    is_cached,
    reads_states,
    through_model,
)
from losa_deploy.compress.team import Team
from losa_deploy.compress.tune import ModelTask, sequences_read, tune
from losa_deploy.compress.walk import Walk, finished_block, grid_of, settle_grid, walk_blocks
from losa_deploy.errors import InputError, UsageError
from losa_deploy.manifest import SourceRecord, TrainingRecord
from losa_deploy.phases import PhaseRecipe
from losa_deploy.progress import Progress
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint


@dataclass
class _Run:
    """What the steps of one compression share; `student` is the only thing they change."""

    recipe: Recipe
    dense: Decoder
    student: Student
    tokens: Tensor
    folder: Path
    source: Path
    masked: frozenset[str]
    progress: Progress
    memory: int
    """Bytes that the run may take."""
    team: Team
    sizes: np.ndarray[tuple[int], np.dtype[np.float64]] = field(init=False)
    """Prunable weights per block."""

    def __post_init__(self) -> None:
        blocks = range(len(self.student.blocks))
        self.sizes = np.array([self.block_size(block) for block in blocks], np.float64)

    def prunable(self, block: int) -> list[str]:
        return [name for name in self.student.block_linears(block) if name in self.masked]

    def block_size(self, block: int) -> int:
        """Prunable weights of a block."""
        return sum(self.student.masked(name).weight.numel() for name in self.prunable(block))

    def block_kept(self) -> list[int]:
        """The largest N of every M that each block can have in the next step of an N:M recipe."""
        assert self.recipe.sparsity.group is not None
        m = self.recipe.sparsity.group[1]
        if self.recipe.prune.regrow:
            return [m] * len(self.sizes)
        found = []
        for block in range(len(self.sizes)):
            with self.student.open(block):
                masks = [self.student.masked(name).mask for name in self.prunable(block)]
                found.append(max((kept_of_group(mask, m) for mask in masks), default=m))
        return found


def compress(
    source: Checkpoint,
    record: SourceRecord,
    recipe: Recipe,
    folder: Path,
    *,
    progress: Progress,
    texts: Path | None = None,
    room: Room = HERE,
) -> AdaptedModel:
    """Compress `source` by `recipe` into `folder`, continuing there if the same run was interrupted.

    A folder of another run (other source, recipe, text or seed) is started afresh, a complete one is returned
    as it is. `texts` is a folder for text that the model wrote itself: runs that ask for the same share it.
    `room` says where it computes and how many bytes it may take there; results depend on it by rounding at
    most. The processes of its team leave what one would, up to rounding; the first of them writes it. Raises
    `InputError` for unusable text or weights or a damaged folder, `GateError` if training
    diverges.
    """
    mark = adapted.fingerprint(record.files, recipe)
    state = adapted.read_state(folder) if folder.is_dir() else None
    if state is not None and state.fingerprint == mark and state.complete:
        return AdaptedModel(folder, state)
    masked, chosen = masked_linears(source, recipe), settled(recipe, room.device)
    dense = Decoder(source, device=room.device)
    student = Student(source, dense)
    own = part_of(recipe, room.team.count)
    limit = stream_room(Geometry.of_checkpoint(source), own, room.bytes)
    dense.streams = student.streams = Streams(folder, limit, STORED[recipe.streams])
    on_cpu = room.bytes if room.device == CPU else available_bytes()
    team = room.team
    if team.count > recipe.calibration.samples:
        raise UsageError(
            f"{team.count} processes cannot share {recipe.calibration.samples} calibration samples.",
            hint="Start fewer processes, or give more --samples.",
        )
    if team.leads:
        check_unpruned(source, folder.parent, on_cpu)
    team.wait()
    if state is None or state.fingerprint != mark:
        tokens = tokens_of_run(source, record, recipe, texts, room, progress)
        empty = AdaptedState(
            fingerprint=mark,
            step=0,
            source=record,
            recipe=recipe,
            masked=tuple(n for n in source.linears if n in masked),
            calibration_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            files={},
        )
        state = _together(team, folder, lambda: _start(folder, tokens, empty))
    tokens = _load_tokens(folder)
    student.restore_rest(adapted.load_rest(folder, state, student.rest(None)))
    run = _Run(chosen, dense, student, tokens, folder, source.folder, masked, progress, room.bytes, team)
    for step in range(state.step + 1, recipe.schedule.steps + 1):
        partial = Partial(folder, step)
        with ExitStack() as stack:
            made = _step(run, state, partial, stack)
            state = _together(team, folder, partial_call(adapted.save_step, folder, made, student))
        if team.leads:
            partial.remove()
    return AdaptedModel(folder, state)


def _together(team: Team, folder: Path, work: Callable[[], AdaptedState]) -> AdaptedState:
    """Let the first process change what is in `folder`; the state that all find there."""
    state = work() if team.leads else None
    team.wait()
    found = state or adapted.read_state(folder)
    if found is None:
        raise InputError(
            f"{folder} has nothing of the first process.",
            hint="Give an --output that all machines share, under the same path.",
        )
    return found


def _start(folder: Path, tokens: Tensor, state: AdaptedState) -> AdaptedState:
    """Begin afresh with these tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _save_tokens(folder, tokens)
    return adapted.write_state(folder, state)


def _stored(run: _Run, state: AdaptedState, partial: Partial | None) -> Callable[[int], StoredBlock]:
    """Blocks as the step before left them, or (with `partial`) this one where it has come to them."""

    def block(number: int) -> StoredBlock:
        found = finished_block(partial, run.student, number) if partial else None
        return found or adapted.stored_block(run.folder, state, run.student, number)

    return block


def masked_linears(source: Checkpoint, recipe: Recipe) -> frozenset[str]:
    """Names of the linears to prune; raises `InputError` if the recipe excludes all of them."""
    patterns = recipe.sparsity.exclude
    names = frozenset(n for n in source.linears if not any(fnmatch.fnmatch(n, p) for p in patterns))
    if not names:
        raise InputError(
            f"sparsity.exclude {list(patterns)} leaves no linear to prune.", hint="Exclude fewer patterns."
        )
    return names


def _step(run: _Run, state: AdaptedState, partial: Partial, stack: ExitStack) -> AdaptedState:
    """One schedule step: rates, then prune (and reconstruct) block by block, then ranks and tuning.

    What is not in `partial` yet is in the student's blocks, which stay open as long as `stack`.
    """
    recipe, step = run.recipe, partial.step
    steps = recipe.schedule.steps
    at_once = recipe.sparsity.structure.stride > 0  # sliding windows have no sparsity in between
    target = allocate.sparsity_ramp(
        recipe.sparsity.target, step, steps, recipe.schedule.ramp, at_once=at_once
    )
    # What a step begins with decides its rates, also where an interrupted run has gone further.
    run.student.stored = _stored(run, state, None)
    before = np.array(state.block_sparsity or np.zeros(len(run.sizes)), np.float64)
    rates = _rates(run, target, before)
    kept = None
    if recipe.sparsity.group is not None:
        kept = allocate.kept_per_block(rates, target, recipe.sparsity, run.sizes, run.block_kept())
    run.student.stored = _stored(run, state, partial)
    label = f"step {step}/{steps}: pruning to {target:.3f}"
    walk = Walk(run.student, run.dense, run.masked, recipe, step, label, run.progress, partial, run.team)
    results, *dense = walk_blocks(walk, run.tokens, rates, kept)
    ranks = tuple(0 for _ in results)
    adapters = any("adapters" in phase.train for phase in recipe.phases)
    through = [phase for phase in recipe.phases if phase.where == "model" and phase.runs(last=step == steps)]
    sharded = _is_sharded(run, through)
    if adapters or (not sharded and _needs_whole_model(run, through)):
        run.student.keep()
        stack.callback(run.student.release)
    elif through and not sharded:
        stack.enter_context(run.student.rest_pinned())
    if adapters:
        ranks = _set_ranks(run, np.array([result.error for result in results], np.float64), step)
    training = [
        TrainingRecord(
            step=step,
            phase=number,
            tokens=phase.steps(*run.tokens.shape, last=step == steps)
            * phase.batch_size
            * run.tokens.shape[1],
            before=tuple(result.trained[place][0] for result in results),
            after=tuple(result.trained[place][1] for result in results),
        )
        for place, (number, phase) in enumerate(walk.phases)
    ]
    training += _model_phases(run, partial, step, dense, sharded=sharded)
    sparsity = 1.0 - np.array([result.kept for result in results], np.float64) / np.maximum(run.sizes, 1)
    return state.model_copy(
        update={
            "step": step,
            "block_sparsity": tuple(float(s) for s in sparsity),
            "block_rank": ranks,
            "block_error": tuple(result.error for result in results),
            "scales": {
                n: run.student.masked(n).scale for n in run.student.names if run.student.masked(n).rank
            },
            "grids": adapted.grid_records(run.student, run.student.names),
            "training": (*state.training, *training),
        }
    )


def _needs_whole_model(run: _Run, phases: Sequence[PhaseRecipe]) -> bool:
    """Whether phases through the model have all blocks in memory: they must, or there is room.

    Norms and biases can be trained with one block in memory if no weight changes with them.
    """
    linears = [run.student.masked(name) for name in run.student.names]
    for phase in phases:
        if set(phase.train) != {"norms"} or any(linear.grid != grid_of(phase) for linear in linears):
            return True
    if not phases:
        return False
    taken = FROZEN_BYTES * all_parameters(run.student.checkpoint) + LIBRARY_BYTES
    return taken <= run.memory


def _is_sharded(run: _Run, phases: Sequence[PhaseRecipe]) -> bool:
    """Whether the processes share out the parameters in phases through the model.

    They do where all of these train weights, and one process has no room for it.
    """
    if run.team.count == 1 or not phases or any("weights" not in phase.train for phase in phases):
        return False
    # Of several phases the one that takes most.
    plain = any(phase.optimizer == "adamw" for phase in phases)
    optimizer = "adamw" if plain else "adamw8bit"
    fits = torch.tensor(float(trains_whole(run.student.checkpoint, run.memory, optimizer)))
    return float(run.team.total(fits)) < run.team.count


def _model_phases(
    run: _Run, partial: Partial, step: int, dense: list[Stream], *, sharded: bool
) -> list[TrainingRecord]:
    """The phases through the whole model that this step has.

    `dense` holds the dense model's last stream, which is taken out as soon as no phase needs it.
    """
    recipe, last = run.recipe, step == run.recipe.schedule.steps
    records: list[TrainingRecord] = []
    for number, phase in enumerate(recipe.phases):
        if phase.where == "blocks" or not phase.runs(last=last):
            continue
        tokens = phase_tokens(phase, run.tokens, run.source, recipe.seed)
        steps = phase.steps(*tokens.shape, last=last)
        trained = steps * min(phase.batch_size, tokens.shape[0]) * tokens.shape[1]
        work = _PhaseWork(step, number, phase, tokens, steps)
        with ExitStack() as stack:
            teacher = _teacher(run, partial, work, dense, stack)
            if not any(reads_states(later, last=last) for later in recipe.phases[number + 1 :]):
                dense.clear()
            losses = (_sharded_phase if sharded else _phase)(run, partial, work, teacher)
        records.append(TrainingRecord(step=step, phase=number, tokens=trained, losses=_thinned(losses)))
    return records


@dataclass(frozen=True)
class _PhaseWork:
    """One phase through the whole model in one schedule step."""

    step: int
    number: int
    """Of the phase, from 0."""
    phase: PhaseRecipe
    tokens: Tensor
    """[sequences, length]"""
    steps: int
    """Of the optimizer."""

    @property
    def labels(self) -> tuple[str | int, ...]:
        return ("tune", self.step, self.number)


def _phase(run: _Run, partial: Partial, work: _PhaseWork, teacher: Teacher) -> tuple[float, ...]:
    """A phase with all parameters in this process; its losses."""
    linears, tokens = [run.student.masked(name) for name in run.student.names], work.tokens
    settle_grid(linears, work.phase, [None] * len(linears))
    whole = run.student.is_open(0)
    names = tuple(n for n in run.student.names if n in run.masked) if whole else ()
    task = ModelTask(
        run.student, run.dense, names, tokens, work.phase, work.steps, run.recipe.precision, run.recipe.seed,
        work.labels,
        recompute=bool(names) and not fits_at_once(
            run.student.checkpoint, -(-work.phase.batch_size // run.team.count) * tokens.shape[1], run.memory,
            work.phase.optimizer,
        ),
        teacher=teacher,
        team=run.team,
    )  # fmt: skip
    losses = tune(task, partial, _reporter(run, work))
    for linear in linears if whole else ():
        linear.settle()
    return losses


def _sharded_phase(run: _Run, partial: Partial, work: _PhaseWork, teacher: Teacher) -> tuple[float, ...]:
    """A phase whose parameters the processes share out; its losses. What an interrupted run has is taken."""
    known = take_up(run.student, partial, work.number)
    if known is not None:
        return known
    trained = shared_out(run.student, work.phase, run.team)
    task = ModelTask(
        trained, run.dense, tuple(n for n in trained.names if n in run.masked), work.tokens, work.phase,
        work.steps, run.recipe.precision, run.recipe.seed, work.labels,
        recompute=True, teacher=teacher, team=run.team, sharded=True,
    )  # fmt: skip
    losses = tune(task, partial, _reporter(run, work))
    collect(trained, run.student, partial, run.team, work.number, losses)
    return losses


def _teacher(run: _Run, partial: Partial, work: _PhaseWork, dense: list[Stream], stack: ExitStack) -> Teacher:
    """What is known of the dense model before the phase; if it runs itself, `stack` has its blocks open."""
    phase, team, recipe = work.phase, run.team, run.recipe
    if not phase.losses.kl:
        return None
    shape, own = Geometry.of_checkpoint(run.student.checkpoint), part_of(recipe, team.count)
    mine = own.phases[work.number]
    short = memory_is_short(shape, own, mine, run.memory, team.count)
    if not is_cached(phase, f"teacher-{work.number}", partial, team, short=short):
        if phase.on_calibration:
            return run.dense.finish(dense[0])
        stack.enter_context(run.dense.open(*range(len(run.dense.blocks))))
        return None
    limit = teacher_room(shape, own, mine, run.memory, team.count)
    room = Streams(run.folder, limit, STORED[recipe.streams])
    read = sequences_read(work.tokens.shape[0], phase, work.steps, recipe.seed, work.labels, team)
    if phase.on_calibration:
        outputs = from_states(dense[0], [team.place(index) for index in read])
    else:
        outputs = through_model(run.dense, work.tokens[read], recipe.precision, room)
    return cached(run.dense, outputs, read, work.tokens.shape[1], phase.top_k, recipe.precision, room)


def _reporter(run: _Run, work: _PhaseWork) -> Callable[[int], None]:
    label = f"step {work.step}/{run.recipe.schedule.steps}: phase {work.number}"
    return lambda done: run.progress(done, work.steps, label)


def _thinned(losses: Sequence[float], most: int = 200) -> tuple[float, ...]:
    """At most so many means of equal stretches."""
    pieces = np.array_split(np.array(losses, np.float64), min(most, max(1, len(losses))))
    return tuple(float(piece.mean()) for piece in pieces if len(piece))


def _rates(
    run: _Run, target: float, before: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Sparsity rate per block, mean exactly `target` over the prunable weights; `before` as they are now."""
    recipe = run.recipe.allocation
    blocks = len(run.sizes)
    if run.recipe.sparsity.structure.stride:
        return np.full(blocks, target)
    if recipe.method == "rmi":
        importance = rmi_importance(run.student, run.tokens[: recipe.samples], recipe.beta)
        rule = allocate.graded_deviation if recipe.rule == "graded" else allocate.two_level_deviation
        deviation = rule(importance)
    elif recipe.method == "slope":
        deviation = allocate.slope_deviation(blocks)
    else:
        deviation = np.zeros(blocks)
    floor = np.zeros(blocks) if run.recipe.prune.regrow else before
    limit = allocate.deviation_limit(target, recipe.delta)
    return allocate.allocate_rates(target, deviation, limit, run.sizes, floor)


@torch.no_grad()
def rmi_importance(
    student: Decoder, tokens: Tensor, beta: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Importance of every block from the CKA of block inputs; features are never kept."""
    stream = student.stream(tokens, batch_size(tokens.shape[0]))
    grams = []
    for block in range(len(student.blocks)):
        grams.append(block_gram(stream.hidden))
        stream = student.advance(block, stream)
    importance = block_importance(linear_cka(grams), beta).numpy()
    return np.asarray(importance, np.float64)


def _set_ranks(run: _Run, errors: np.ndarray[tuple[int], np.dtype[np.float64]], step: int) -> tuple[int, ...]:
    """Give every block its rank for this step; the function of the model does not change."""
    recipe = run.recipe
    mean_rank = allocate.rank_ramp(recipe.rank.start, recipe.rank.end, step, recipe.schedule.steps)
    basis = errors if recipe.rank.method == "error" else np.ones_like(errors)
    ranks = allocate.allocate_ranks(basis, mean_rank, recipe.rank.maximum)
    for block, rank in enumerate(ranks):
        for name in run.student.block_linears(block):
            draw = generator(recipe.seed, "rank", step, name)
            run.student.masked(name).set_rank(int(rank), recipe.rank.scale, draw)
    return tuple(int(r) for r in ranks)


def _save_tokens(folder: Path, tokens: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": tokens}, folder / adapted.CALIBRATION_FILE)


def _load_tokens(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / adapted.CALIBRATION_FILE)["tokens"]
