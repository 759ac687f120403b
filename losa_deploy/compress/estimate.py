"""What a compression will take, from the shapes of a model: memory, disk and time, before any work.

Counts are of what the code holds at once and multiplies; rates are measured on this machine (`rates.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from losa_deploy.compress.check import is_whole
from losa_deploy.compress.memory import (
    FROZEN_BYTES,
    LIBRARY_BYTES,
    MOVING_BYTES,
    ROUNDED_BYTES,
    activation_bytes,
    moving_bytes,
)
from losa_deploy.compress.precision import STORED
from losa_deploy.compress.rates import Rates
from losa_deploy.compress.sample import FEWEST, SCORE_BYTES, arranged
from losa_deploy.compress.teacher import CHUNK_TOKENS
from losa_deploy.compress.tune import MICRO_TOKENS
from losa_deploy.phases import PhaseRecipe
from losa_deploy.recipe import Recipe

if TYPE_CHECKING:
    from losa_deploy.sources.checkpoint import Checkpoint

Shape = tuple[int, int]
STREAMS = 5
"""Streams through the blocks that exist at once: three of the student, one of the dense model, a new one."""
BLOCK_BYTES = 9
"""Per weight of an open block: the dense one's, the student's, its mask."""
TRAINED_BYTES = 27
"""Per weight that trains: gradient, two moments, the values before, what rounding keeps for the gradient."""
TOGETHER_BYTES = 12
"""Per weight of a block that processes share out, while it computes: its value, rounded, its gradient."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide; of a block whose linears are the largest."""

    blocks: int
    linears: Sequence[Shape]
    """Of one block, (out, in)."""
    key_width: int
    """Numbers of a token's keys in one block."""
    outer: int
    """Weights outside of the blocks."""
    vocabulary: int

    @classmethod
    def of(cls, linears: Mapping[str, Shape], others: Mapping[str, Shape]) -> Geometry:
        """From names, as in a Hugging Face folder or a GGUF file, and shapes."""
        blocks: dict[int, dict[str, Shape]] = {}
        for name, shape in linears.items():
            found = re.search(r"\.(\d+)\.", name)
            blocks.setdefault(int(found[1]) if found else 0, {})[name] = shape
        largest = max(blocks.values(), key=lambda block: sum(r * c for r, c in block.values()))
        keys = [shape[0] for name, shape in largest.items() if re.search(r"k_proj|attn_k", name)]
        outer = sum(rows * columns for rows, columns in others.values())
        vocabulary = max((rows for rows, _ in others.values()), default=0)
        return cls(len(blocks), tuple(largest.values()), max(keys, default=0), outer, vocabulary)

    @classmethod
    def of_checkpoint(cls, source: Checkpoint) -> Geometry:
        """From a model's headers."""
        names = [source.family.embedding] + ([] if source.tied else [source.family.head])
        shapes = {name: source.shape(f"{name}.weight") for name in names}
        return cls.of(source.linears, {name: (shape[0], shape[1]) for name, shape in shapes.items()})

    @property
    def hidden(self) -> int:
        return min(columns for _, columns in self.linears)

    @property
    def inner(self) -> int:
        return max(columns for _, columns in self.linears)

    @property
    def weights(self) -> int:
        """Of a block."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def all(self) -> int:
        return self.blocks * self.weights + self.outer

    @property
    def inputs(self) -> Sequence[int]:
        """Widths of the inputs of a block's linears: of attention, its output, the MLP, and its output."""
        return (self.hidden, self.hidden, self.hidden, self.inner)


@dataclass(frozen=True)
class Estimate:
    """What a run takes."""

    peak_ram_bytes: int
    disk_bytes: int
    seconds: float
    stages: Mapping[str, int]
    """Bytes by stage."""


def estimate(
    shape: Geometry, recipe: Recipe, memory: int, rates: Rates, *, bf16: bool, processes: int = 1
) -> Estimate:
    """What `compress` takes with `memory` bytes at hand; of several processes what each takes."""
    own = part_of(recipe, processes)
    streams, room = _streams(shape, own), stream_room(shape, own, memory)
    in_files = max(0, streams - room)
    stages = {"check": _check(shape, memory), "blocks": _blocks(shape, own) + min(streams, room)}
    if recipe.calibration.source == "self":
        stages["text"], files = _text(shape, own, memory, bf16)
        in_files = max(in_files, files)
    for number, phase in enumerate(own.phases):
        if phase.where == "model":
            stages[f"phase {number}"] = _phase(shape, own, phase, memory, processes)
            in_files = max(in_files, _cache_in_files(shape, own, phase, memory, processes))
    seconds = _seconds(shape, recipe, rates, processes)
    disk = _disk(shape, recipe) + in_files
    return Estimate(max(stages.values()), disk, seconds, stages)


def stream_room(shape: Geometry, recipe: Recipe, memory: int) -> int:
    """Bytes of memory for streams of calibration; the others lie in files."""
    return max(0, memory - _blocks(shape, recipe))


def _streams(shape: Geometry, recipe: Recipe) -> int:
    return STREAMS * _stored(recipe) * _tokens(recipe) * shape.hidden


def _stored(recipe: Recipe) -> int:
    """Bytes of a number of a stream."""
    return STORED[recipe.streams].itemsize


def part_of(recipe: Recipe, processes: int) -> Recipe:
    """A process's part of the samples and of every batch."""
    samples = -(-recipe.calibration.samples // processes)
    phases = [p.model_copy(update={"batch_size": -(-p.batch_size // processes)}) for p in recipe.phases]
    calibration = recipe.calibration.model_copy(update={"samples": samples})
    return recipe.model_copy(update={"calibration": calibration, "phases": tuple(phases)})


def _tokens(recipe: Recipe) -> int:
    return recipe.calibration.samples * recipe.calibration.sequence_length


def _check(shape: Geometry, memory: int) -> int:
    if is_whole(shape.all, memory):
        return LIBRARY_BYTES + 4 * shape.all + 4 * shape.weights
    return LIBRARY_BYTES + 2 * 4 * (shape.outer + 2 * shape.weights)


def _text(shape: Geometry, recipe: Recipe, memory: int, bf16: bool) -> tuple[int, int]:
    """Weights, keys and values, and bytes of files; as `sample` arranges them on a CPU, or in bf16."""
    import torch

    length, element, stored = recipe.calibration.sequence_length, 2 if bf16 else 4, 2 if bf16 else 1
    each = 2 * shape.blocks * shape.key_width * length * element + SCORE_BYTES * shape.vocabulary
    outer = element * shape.outer + (0 if bf16 else shape.vocabulary * shape.hidden)
    free, whole = memory - LIBRARY_BYTES - outer, stored * shape.blocks * shape.weights
    resident = free >= whole + FEWEST * each
    blocks = whole if resident else element * shape.weights
    samples, threads = recipe.calibration.samples, torch.get_num_threads()
    together, workers = arranged(not bf16, samples, threads, free, blocks, each)
    files = 0 if resident or bf16 else whole
    return LIBRARY_BYTES + outer + blocks + together * workers * each, files


def _blocks(shape: Geometry, recipe: Recipe) -> int:
    """Of the walk through the blocks, without the streams."""
    statistics = 0
    if recipe.prune.method == "sparsegpt" and recipe.sparsity.target:
        statistics = 4 * (sum(width**2 for width in shape.inputs) + 2 * shape.inner**2)
    trained = max(
        (p.window * TRAINED_BYTES * shape.weights for p in recipe.phases if p.where == "blocks"), default=0
    )
    window = max((p.window for p in recipe.phases if p.where == "blocks"), default=1)
    held = (BLOCK_BYTES + 5 * (window - 1)) * shape.weights
    return LIBRARY_BYTES + 4 * shape.outer + held + max(statistics, trained)


def memory_is_short(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int) -> bool:
    """Whether a phase through the model leaves no room for the dense model beside it.

    `recipe` and `phase` are a process's part. The dense model's states of the calibration, which are enough
    where there is no other text, need no room: past a limit they lie in files.
    """
    if phase.on_calibration:
        return False
    return _training(shape, recipe, phase, memory, processes, _resident(shape, recipe, phase)) > memory


def teacher_room(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int) -> int:
    """Bytes of memory for what a cached teacher says; the rest lies in files."""
    return max(0, memory - _training(shape, recipe, phase, memory, processes, 0))


def _resident(shape: Geometry, recipe: Recipe, phase: PhaseRecipe) -> int:
    """Of what the dense model says by its states, or by itself."""
    if phase.on_calibration:
        return 2 * _stored(recipe) * _tokens(recipe) * shape.hidden
    return 4 * shape.blocks * shape.weights


def _cache(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, processes: int) -> int:
    """Of what a cached teacher says (tokens, their scores, the rest), and of the streams that make it."""
    asked, own = -(-max(phase.tokens, phase.final_tokens) // processes), _tokens(recipe)
    positions = min(asked or own, own) if phase.on_calibration else asked or own
    streams = 0 if phase.on_calibration else 2 * _stored(recipe) * min(positions, CHUNK_TOKENS) * shape.hidden
    return (8 * min(phase.top_k, shape.vocabulary) + 4) * positions + streams


def _is_cached(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int) -> bool:
    if not phase.losses.kl or phase.teacher != "auto":
        return phase.losses.kl > 0 and phase.teacher == "cached"
    return memory_is_short(shape, recipe, phase, memory, processes)


def _cache_in_files(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int) -> int:
    if not _is_cached(shape, recipe, phase, memory, processes):
        return 0
    room = teacher_room(shape, recipe, phase, memory, processes)
    return max(0, _cache(shape, recipe, phase, processes) - room)


def _phase(shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int) -> int:
    """Of a phase through the model, with what teaches it."""
    if not _is_cached(shape, recipe, phase, memory, processes):
        known = _resident(shape, recipe, phase) if phase.losses.kl else 0
        return _training(shape, recipe, phase, memory, processes, known)
    room = teacher_room(shape, recipe, phase, memory, processes)
    held = min(room, _cache(shape, recipe, phase, processes))
    return held + _training(shape, recipe, phase, memory, processes, 0)


def _training(
    shape: Geometry, recipe: Recipe, phase: PhaseRecipe, memory: int, processes: int, known: int
) -> int:
    """Of a phase through the model beside `known` bytes about the dense one."""
    length = phase.sequence_length or recipe.calibration.sequence_length
    frozen = set(phase.train) == {"norms"}
    tokens = (
        min(phase.batch_size * length, max(MICRO_TOKENS, length)) if frozen else phase.batch_size * length
    )
    activations = activation_bytes(shape.hidden, shape.inner, tokens)
    head = 256 * shape.vocabulary * 16
    base = LIBRARY_BYTES + 4 * shape.outer + known + head
    if not frozen:
        weights = shape.blocks * shape.weights
        moving = moving_bytes(phase.optimizer)
        whole = base + (moving + ROUNDED_BYTES) * weights + shape.blocks * activations
        inputs = 4 * tokens * shape.hidden * shape.blocks
        again = moving * weights + inputs + 2 * BLOCK_BYTES * shape.weights + activations
        if processes > 1 and LIBRARY_BYTES + 4 * shape.outer + moving * weights > memory:
            again += (MOVING_BYTES - moving) * weights  # in eight bits moments are not shared out
            again += TOGETHER_BYTES * shape.weights - MOVING_BYTES * weights * (processes - 1) // processes
        return whole if whole <= memory else base + again
    if FROZEN_BYTES * shape.all + LIBRARY_BYTES <= memory:
        return base + FROZEN_BYTES * shape.blocks * shape.weights + shape.blocks * activations
    return base + 4 * tokens * shape.hidden * shape.blocks + 3 * BLOCK_BYTES * shape.weights + activations


def _disk(shape: Geometry, recipe: Recipe) -> int:
    """The finished and the unfinished step, and the point that training goes on from beside the next one."""
    state = int(2 * 4.2 * shape.blocks * shape.weights)
    points = [p for p in recipe.phases if p.where == "model" and {"weights", "adapters"} & set(p.train)]
    return state + (24 * shape.blocks * shape.weights if points else 0)


def _seconds(shape: Geometry, recipe: Recipe, rates: Rates, processes: int) -> float:
    """Products are shared by the processes, an optimizer's step is not; of a block's inputs each has one."""
    tokens, total = _tokens(recipe) / processes, 0.0
    if recipe.calibration.source == "self":
        # One token per sequence at a time: half of the rate of large products in bf16; packed weights are
        # multiplied somewhat slower than the linears of a block.
        bf16 = rates.products > rates.plain
        total += (4 / rates.products if bf16 else 2.5 / rates.blocks) * tokens * shape.all
    forward = 2 * tokens * shape.weights / rates.blocks
    moments = 2 * tokens * sum(width**2 for width in shape.inputs) / rates.plain
    solve = 4 * sum(width**3 for width in shape.inputs) / rates.plain + 60 * shape.weights / rates.elements
    sparse = recipe.prune.method == "sparsegpt" and recipe.sparsity.target > 0
    solve /= min(processes, len(shape.inputs))
    per_step = 3.5 * forward + (moments + solve if sparse else 0.0)
    steps = recipe.schedule.steps
    total += steps * shape.blocks * per_step
    for step in range(1, steps + 1):
        for phase in recipe.phases:
            if phase.runs(last=step == steps):
                total += _trained_seconds(shape, recipe, phase, rates, processes, last=step == steps)
    return total


def _trained_seconds(
    shape: Geometry, recipe: Recipe, phase: PhaseRecipe, rates: Rates, processes: int, *, last: bool
) -> float:
    length = phase.sequence_length or recipe.calibration.sequence_length
    steps = phase.steps(recipe.calibration.samples, length, last=last)
    tokens, weights = (
        steps * -(-phase.batch_size // processes) * length,
        shape.blocks * shape.weights * phase.window,
    )
    moves = {"weights", "adapters", "scales"} & set(phase.train)
    seconds = 6 * tokens * weights / rates.blocks
    seconds += steps * weights / rates.moved if moves else 8 * steps * weights / rates.elements
    if phase.where == "model" and phase.losses.kl and not phase.on_calibration:
        seconds += 2 * tokens * weights / rates.blocks  # the dense model
    if phase.where == "model":
        seconds += 6 * tokens * shape.vocabulary * shape.hidden / rates.products
        seconds += 30 * tokens * shape.vocabulary / rates.elements
    return seconds
