"""LoSA's outer loop: T alternations of allocating, pruning and adapting."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.compress import adapted, allocate
from losa_deploy.compress.adapt import tune
from losa_deploy.compress.adapted import AdaptedModel, AdaptedState
from losa_deploy.compress.calibrate import calibration_tokens, text_tokens
from losa_deploy.compress.decoder import Decoder, batch_size
from losa_deploy.compress.importance import block_gram, block_importance, linear_cka
from losa_deploy.compress.seeds import generator
from losa_deploy.compress.walk import Walk, walk_blocks
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Progress
from losa_deploy.layouts import tiled
from losa_deploy.manifest import SourceRecord
from losa_deploy.parity import logit_tolerance
from losa_deploy.recipe import Recipe

PROBE_TOKENS, PROBE_STRIDE = 32, 7919
"""Length of the sequence that compares two models, and how far apart its token ids are."""


@dataclass
class _Run:
    """What the steps of one compression share; `student` is the only thing they change."""

    recipe: Recipe
    dense: Decoder
    student: Decoder
    tokens: Tensor
    tuning_tokens: Tensor
    masked: frozenset[str]
    progress: Progress
    sizes: np.ndarray[tuple[int], np.dtype[np.float64]] = field(init=False)
    """Prunable weights per block."""

    def __post_init__(self) -> None:
        blocks = range(len(self.student.blocks))
        self.sizes = np.array([sum(m.numel() for m in self.block_masks(b)) for b in blocks], np.float64)

    def block_masks(self, block: int) -> list[Tensor]:
        names = self.student.block_linears(block)
        return [self.student.masked(name).mask for name in names if name in self.masked]

    def block_sparsity(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Share of pruned positions per block, over the prunable linears."""
        kept = [sum(int(m.sum()) for m in self.block_masks(b)) for b in range(len(self.sizes))]
        return 1.0 - np.array(kept, np.float64) / np.maximum(self.sizes, 1)


def compress(
    source: Checkpoint, record: SourceRecord, recipe: Recipe, folder: Path, *, progress: Progress
) -> AdaptedModel:
    """Compress `source` by `recipe` into `folder`, continuing there if the same run was interrupted.

    A folder of another run (other source, recipe or seed) is started afresh, a complete one is returned
    as it is. Raises `InputError` for unusable text or weights or a damaged folder, `GateError` if training
    diverges.
    """
    mark = adapted.fingerprint(record.files, recipe)
    state = adapted.read_state(folder) if folder.is_dir() else None
    if state is not None and state.fingerprint == mark and state.complete:
        return AdaptedModel(folder, state)
    masked = masked_linears(source, recipe)
    dense, student = Decoder(source), Decoder(source, assembled=True)
    student.mask_linears()
    check_unpruned(source, dense, student)
    if state is None or state.fingerprint != mark:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokens = calibration_tokens(dense, source.folder, recipe.calibration, recipe.seed, progress)
        _save_tokens(folder, tokens)
        state = AdaptedState(
            fingerprint=mark,
            step=0,
            source=record,
            recipe=recipe,
            masked=tuple(n for n in source.linears if n in masked),
            calibration_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            files={},
        )
        state = adapted.write_state(folder, state)
    else:
        tokens = _load_tokens(folder)
        if state.step:
            adapted.restore(folder, state, student)
    run = _Run(recipe, dense, student, tokens, _tuning_tokens(source, recipe, tokens), masked, progress)
    for step in range(state.step + 1, recipe.schedule.steps + 1):
        state = adapted.save_step(folder, _step(run, state, step), student)
    return AdaptedModel(folder, state)


@torch.no_grad()
def check_unpruned(source: Checkpoint, dense: Decoder, student: Decoder) -> None:
    """Compare the student, whose masks are still full, with the model as transformers loads it, on logits.

    The student holds what later stages read tensor by tensor: if the two differ, one of them is not the
    user's model. Raises `InputError`.
    """
    vocabulary = source.shape(f"{source.family.embedding}.weight")[0]
    tokens = (torch.arange(1, PROBE_TOKENS + 1) * PROBE_STRIDE % vocabulary)[None]
    expected, found = dense.logits(tokens), student.logits(tokens)
    difference = float((found - expected).abs().max())
    inner = max(columns for _, columns in source.linears.values())
    tolerance = logit_tolerance(float(expected.abs().max()), source.block_count, inner)
    if not difference <= tolerance:
        raise InputError(
            f"The tensors of {source.folder} are not the model that transformers loads from it: logits "
            f"differ by {difference:.3g}, expected at most {tolerance:.3g}.",
            hint="Load the model with transformers and save it to a new folder with save_pretrained.",
        )


def masked_linears(source: Checkpoint, recipe: Recipe) -> frozenset[str]:
    """Names of the linears to prune; raises `InputError` if the recipe excludes all of them."""
    patterns = recipe.sparsity.exclude
    names = frozenset(n for n in source.linears if not any(fnmatch.fnmatch(n, p) for p in patterns))
    if not names:
        raise InputError(
            f"sparsity.exclude {list(patterns)} leaves no linear to prune.", hint="Exclude fewer patterns."
        )
    return names


def _step(run: _Run, state: AdaptedState, step: int) -> AdaptedState:
    """One schedule step: rates, then prune (and reconstruct) block by block, then ranks and tuning."""
    recipe = run.recipe
    steps = recipe.schedule.steps
    target = allocate.sparsity_ramp(recipe.sparsity.target, step, steps, recipe.schedule.ramp)
    rates = _rates(run, target)
    kept = None
    group = recipe.sparsity.group
    if group is not None:
        kept = _kept_per_block(rates, target, group, mixed=recipe.sparsity.mixed)
    label = f"step {step}/{steps}: pruning to {target:.3f}"
    errors = walk_blocks(
        Walk(run.student, run.dense, run.masked, recipe, step, label, run.progress), run.tokens, rates, kept
    )
    ranks = tuple(0 for _ in errors)
    if recipe.adapt.mode == "adapters":
        ranks = _set_ranks(run, np.array(errors, np.float64), step)
    if recipe.adapt.mode in ("adapters", "direct"):
        last = step == steps
        count = recipe.adapt.final_steps if last and recipe.adapt.final_steps else recipe.adapt.steps
        tuning = f"step {step}/{steps}: tuning"
        draw = generator(recipe.seed, "tune", step)
        tune(
            run.student, run.dense, run.tuning_tokens, recipe.adapt, count, draw,
            lambda done: run.progress(done, count, tuning),
        )  # fmt: skip
    return state.model_copy(
        update={
            "step": step,
            "block_sparsity": tuple(float(s) for s in run.block_sparsity()),
            "block_rank": ranks,
            "block_error": tuple(errors),
            "scales": {
                n: run.student.masked(n).scale for n in run.student.names if run.student.masked(n).rank
            },
        }
    )


def _rates(run: _Run, target: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Sparsity rate per block, mean exactly `target` over the prunable weights."""
    recipe = run.recipe.allocation
    blocks = len(run.sizes)
    if recipe.method == "rmi":
        importance = rmi_importance(run.student, run.tokens[: recipe.samples], recipe.beta)
        rule = allocate.graded_deviation if recipe.rule == "graded" else allocate.two_level_deviation
        deviation = rule(importance)
    elif recipe.method == "slope":
        deviation = allocate.slope_deviation(blocks)
    else:
        deviation = np.zeros(blocks)
    floor = np.zeros(blocks) if run.recipe.prune.regrow else run.block_sparsity()
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


def _kept_per_block(
    rates: np.ndarray[tuple[int], np.dtype[np.float64]], target: float, group: tuple[int, int], *, mixed: bool
) -> list[int]:
    """N of every M for each block at this step's mean rate: all equal, or mixed around it."""
    n, m = group
    # On the ramp, before the target is reached, N is rounded up: nothing is pruned too early.
    mean_kept = max(n, int(np.ceil(m * (1.0 - target) - 1e-9)))
    if mean_kept >= m:
        return [m] * len(rates)
    if not mixed:
        return [mean_kept] * len(rates)
    # Tiles store pairs of slots: an odd N of 16 takes the bytes of the next even one.
    unit = 2 if m == tiled.WIDE and mean_kept % 2 == 0 else 1
    spread = rates - rates.mean()
    largest = float(np.abs(spread).max())
    wanted = 1.0 - mean_kept / m + (spread / largest * unit / m if largest > 0 else spread)
    return [unit * int(k) for k in allocate.mixed_kept(wanted, m // unit, mean_kept // unit)]


def _set_ranks(run: _Run, errors: np.ndarray[tuple[int], np.dtype[np.float64]], step: int) -> tuple[int, ...]:
    """Give every block its rank for this step; the function of the model does not change."""
    recipe = run.recipe
    mean_rank = allocate.rank_ramp(recipe.rank.start, recipe.rank.end, step, recipe.schedule.steps)
    basis = errors if recipe.rank.method == "error" else np.ones_like(errors)
    ranks = allocate.allocate_ranks(basis, mean_rank, recipe.rank.maximum)
    for block, rank in enumerate(ranks):
        for name in run.student.block_linears(block):
            draw = generator(recipe.seed, "rank", step, name)
            run.student.masked(name).set_rank(int(rank), recipe.adapt.alpha, draw)
    return tuple(int(r) for r in ranks)


def _tuning_tokens(source: Checkpoint, recipe: Recipe, calibration: Tensor) -> Tensor:
    """What global tuning trains on: the calibration tokens, or windows of the recipe's own text."""
    if recipe.adapt.data == "calibration" or recipe.adapt.mode not in ("adapters", "direct"):
        return calibration
    count = recipe.adapt.batch_size * max(recipe.adapt.steps, recipe.adapt.final_steps)
    length = recipe.calibration.sequence_length
    return text_tokens(source.folder, Path(recipe.adapt.data), count, length, recipe.seed)


def _save_tokens(folder: Path, tokens: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"tokens": tokens}, folder / adapted.CALIBRATION_FILE)


def _load_tokens(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / adapted.CALIBRATION_FILE)["tokens"]
