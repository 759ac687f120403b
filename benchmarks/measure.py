"""The last stage of a run: measure dense, merged and exported side by side and write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.gate import Parity, evaluation_text
from losa_deploy.interfaces import Progress, Runtime, no_progress
from losa_deploy.model import SparseModel
from losa_deploy.plugins import load_runtime
from losa_deploy.text import load_tokenizer

from .accuracy import summarize, text_windows, window_losses
from .assemble import Found, Job, assemble
from .baseline import dense_baseline
from .latency import Open, measure_latency
from .memory import measure_footprint
from .report import Report
from .rival import RivalFile, rival_file

STEPS = 10
RIVAL = "rival"


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
        folder = _dense_folder(job)
    progress(1, STEPS, "quantized rival")
    with _timed(stage_times, "quantized rival"):
        rival = _rival(job, folder)
    found = Found(folder, rival, timings=stage_times)
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


def _dense_folder(job: Job) -> Path:
    """The dense baseline, from the merged model's weights if the dense ones are not at hand."""
    name = f"dense-{job.exporter.name}" if job.source else f"merged-dense-{job.exporter.name}"
    source = job.source or job.model.checkpoint
    return dense_baseline(source, job.exported, job.exporter, job.work / name, no_progress, job.warn)


def _rival(job: Job, dense_folder: Path) -> RivalFile:
    """The file that people would run otherwise; the dense baseline is what it is made of if it is a GGUF."""
    dense = next(iter(sorted(dense_folder.glob("*.gguf"))), None)
    kind = job.recipe.verify.rival
    return rival_file(job.source, job.exported, dense, kind, job.work, job.threads, job.warn)


def _models(job: Job, found: Found) -> dict[str, tuple[Runtime, Path]]:
    """Runtime and place of all that is timed."""
    models = {
        "dense": (job.runtime.baseline(), found.dense_folder),
        "exported": (job.runtime, job.exported),
    }
    if found.rival.path is not None:
        models[RIVAL] = (load_runtime(found.rival.runtime), found.rival.path)
    return models


def _measure_quality(
    job: Job, found: Found, models: Mapping[str, tuple[Runtime, Path]], progress: Progress
) -> None:
    """Perplexity of all models on the same windows, one in memory at a time."""
    verify = job.recipe.verify
    window = min(verify.window, _context(job.model))
    tokenizer = load_tokenizer(job.model.folder)
    windows = text_windows(tokenizer, evaluation_text(verify.text), window, verify.max_tokens)
    scored = {**models, "merged": (job.reference, job.model.folder)}
    if job.source is None:
        del scored["dense"]
    for done, (name, model) in enumerate(scored.items(), start=2):
        progress(done, STEPS, f"perplexity of {name}")
        session = _opener(job, *model)()
        try:
            found.losses[name] = window_losses(session, windows)
        finally:
            session.close()
        found.quality[name] = summarize(found.losses[name], window)


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
