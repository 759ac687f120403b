"""The last stage of a run: measure dense, merged and exported side by side and write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.compress.memory import all_parameters, available_bytes
from losa_deploy.interfaces import Runtime
from losa_deploy.model import SparseModel
from losa_deploy.plugins import load_runtime
from losa_deploy.progress import Progress, no_progress
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.text.tokenizer import load_tokenizer
from losa_deploy.verify.distance import Floats
from losa_deploy.verify.judge import Parity
from losa_deploy.verify.oracle import Oracle, Question
from losa_deploy.verify.questions import evaluation_text

from ..accuracy import negative_log_likelihoods, summarize, text_windows, window_losses
from ..latency import Open, measure_latency
from ..memory import measure_footprint
from ..rival import RivalFile, rival_file
from .assemble import Found, Job, assemble
from .baseline import DenseBaseline, baseline_name, dense_baseline
from .document import Report

STEPS = 10
RIVAL = "rival"
DENSE_BYTES = 6
"""Per parameter of the dense baseline and what is open beside it."""


def measure(
    job: Job,
    parity: Parity | None,
    *,
    timings: Mapping[str, float] | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Measure and report; `timings` (stage → seconds) of the stages before are passed through."""
    stage_times: dict[str, float] = dict(timings or {})
    progress(0, STEPS, "dense baseline")
    with _timed(stage_times, "dense baseline"):
        dense = _dense(job)
    progress(1, STEPS, "quantized rival")
    with _timed(stage_times, "quantized rival"):
        rival = _rival(job, dense.folder)
    found = Found(dense, rival, timings=stage_times)
    models = _models(job, found)
    with _timed(stage_times, "perplexity"):
        _measure_quality(job, found, models, progress)
    with _timed(stage_times, "memory"):
        for done, (name, (runtime, path)) in enumerate(models.items(), start=6):
            progress(done, STEPS, f"memory of {name}")
            found.footprint[name] = measure_footprint(runtime.name, path, threads=job.threads)
    progress(9, STEPS, "speed")
    with _timed(stage_times, "speed"):
        workload = job.workload.fits(_context(job.model))
        openers = {name: _opener(job, *model) for name, model in models.items()}
        found.speed = measure_latency(openers, workload, seed=job.recipe.seed)
    progress(STEPS, STEPS, "done")
    return assemble(job, found, parity)


def _dense(job: Job) -> DenseBaseline:
    """The dense baseline, from the merged model's weights if the dense ones are not at hand.

    Without a folder if the model does not fit into memory in f32 beside those it is compared with.
    """
    source = job.source or job.model.checkpoint
    memory = available_bytes() if job.memory is None else job.memory
    needed = DENSE_BYTES * all_parameters(source)
    if needed > memory:
        gigabytes = f"{needed / 1e9:.1f} GB of memory in f32, {memory / 1e9:.1f} GB can be had"
        return DenseBaseline.of_source(source, f"it needs {gigabytes}")
    name = baseline_name(job.exporter.name) if job.source else f"merged-{baseline_name(job.exporter.name)}"
    folder = dense_baseline(source, job.exported, job.exporter, job.work / name, no_progress, job.warn)
    return DenseBaseline.of_folder(folder)


def _rival(job: Job, dense_folder: Path | None) -> RivalFile:
    """The file that people would run otherwise; made of the dense baseline if that has the same format."""
    kind = job.recipe.verify.rival
    return rival_file(job.source, job.exported, dense_folder, kind, job.work, job.threads, job.warn)


def _models(job: Job, found: Found) -> dict[str, tuple[Runtime, Path]]:
    """Runtime and place of all that is timed."""
    models: dict[str, tuple[Runtime, Path]] = {}
    if found.dense.folder is not None:
        models["dense"] = (job.runtime.baseline(), found.dense.folder)
    models["exported"] = (job.runtime, job.exported)
    if found.rival.path is not None:
        models[RIVAL] = (load_runtime(found.rival.runtime), found.rival.path)
    return models


def _measure_quality(
    job: Job, found: Found, models: Mapping[str, tuple[Runtime, Path]], progress: Progress
) -> None:
    """Perplexity of all models on the same windows, one in memory at a time.

    The merged model, in torch and f32, is the slowest: how long a window takes it decides how many
    `verify.minutes` allow. So is the dense one where it is not run otherwise.
    """
    verify = job.recipe.verify
    window = min(verify.window, _context(job.model))
    tokenizer = load_tokenizer(job.model.folder)
    windows = text_windows(tokenizer, evaluation_text(verify.text), window, verify.max_tokens)
    found.windows_asked = len(windows)
    sessions = {name: model for name, model in models.items() if name != "dense" or job.source is not None}
    in_torch = {"merged": job.model.checkpoint}
    if job.source is not None and "dense" not in sessions:
        in_torch["dense"] = job.source
    share = 60.0 * verify.minutes / (len(sessions) + len(in_torch))
    progress(2, STEPS, "perplexity of merged")
    windows = _affordable(job, windows, share)
    steps = iter(range(2, 6))
    for name, checkpoint in in_torch.items():
        progress(next(steps), STEPS, f"perplexity of {name}")
        found.losses[name] = _oracle_losses(checkpoint, windows, job.threads)
    for name, model in sessions.items():
        progress(next(steps), STEPS, f"perplexity of {name}")
        session = _opener(job, *model)()
        try:
            found.losses[name] = window_losses(session, windows)
        finally:
            session.close()
    found.quality = {name: summarize(losses, window) for name, losses in found.losses.items()}


def _affordable(job: Job, windows: list[list[int]], seconds: float) -> list[list[int]]:
    """The first windows, so many as the merged model reads in `seconds`; at least one."""
    if len(windows) == 1:
        return windows
    start = time.perf_counter()
    _oracle_losses(job.model.checkpoint, windows[:1], job.threads)
    each = time.perf_counter() - start
    return windows[: max(1, int(seconds / each))]


def _oracle_losses(checkpoint: Checkpoint, windows: list[list[int]], threads: int) -> list[Floats]:
    """Negative log-likelihoods [n] of every window, with one block in memory."""
    answers = Oracle(checkpoint).answers([Question.whole(window) for window in windows], threads=threads)
    return [negative_log_likelihoods(a, w) for a, w in zip(answers, windows, strict=True)]


def _opener(job: Job, runtime: Runtime, path: Path) -> Open:
    return lambda: runtime.open(path, threads=job.threads)


def _context(model: SparseModel) -> int:
    """Context length of the model; very large if its config does not say."""
    length = model.config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 1 << 30


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
