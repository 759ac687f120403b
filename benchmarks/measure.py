"""The last stage of a run: measure dense, merged and exported side by side and write the report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.gate import Parity, evaluation_text
from losa_deploy.interfaces import Progress, Session, no_progress
from losa_deploy.model import SparseModel
from losa_deploy.text import load_tokenizer

from .accuracy import perplexity, text_windows
from .assemble import Found, Job, assemble
from .baseline import dense_baseline
from .latency import Open, measure_latency
from .memory import measure_footprint
from .report import Report

STEPS = 7


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
    found = Found(folder, timings=stage_times)
    with _timed(stage_times, "perplexity"):
        _measure_quality(job, found, progress)
    with _timed(stage_times, "memory"):
        for done, (name, path) in enumerate((("dense", folder), ("exported", job.exported)), start=4):
            progress(done, STEPS, f"memory of {name}")
            runtime = job.runtime if name == "exported" else job.runtime.baseline()
            found.footprint[name] = measure_footprint(runtime.name, path, threads=job.threads)
    progress(6, STEPS, "speed")
    with _timed(stage_times, "speed"):
        openers = {"dense": _dense_opener(job, folder), "exported": _opener(job, job.exported)}
        workload = job.workload.fits(_context(job.model))
        found.speed = measure_latency(openers, workload, seed=job.recipe.seed)
    progress(STEPS, STEPS, "done")
    return assemble(job, found, parity)


def _dense_folder(job: Job) -> Path:
    """The dense baseline, from the merged model's weights if the dense ones are not at hand."""
    name = f"dense-{job.exporter.name}" if job.source else f"merged-dense-{job.exporter.name}"
    source = job.source or job.model.checkpoint
    return dense_baseline(source, job.exported, job.exporter, job.work / name, no_progress, job.warn)


def _measure_quality(job: Job, found: Found, progress: Progress) -> None:
    """Perplexity of the three models, one in memory at a time."""
    verify = job.recipe.verify
    window = min(verify.window, _context(job.model))
    tokenizer = load_tokenizer(job.model.folder)
    windows = text_windows(tokenizer, evaluation_text(verify.text), window, verify.max_tokens)
    models: dict[str, Open] = {
        "merged": lambda: job.reference.open(job.model.folder, threads=job.threads),
        "exported": _opener(job, job.exported),
    }
    if job.source is not None:
        models = {"dense": _dense_opener(job, found.dense_folder), **models}
    for done, (name, open_model) in enumerate(models.items(), start=1):
        progress(done, STEPS, f"perplexity of {name}")
        session = open_model()
        try:
            found.quality[name] = perplexity(session, windows, window)
        finally:
            session.close()


def _opener(job: Job, folder: Path) -> Open:
    def open_model() -> Session:
        return job.runtime.open(folder, threads=job.threads)

    return open_model


def _dense_opener(job: Job, folder: Path) -> Open:
    def open_model() -> Session:
        return job.runtime.baseline().open(folder, threads=job.threads)

    return open_model


def _context(model: SparseModel) -> int:
    """Context length of the model; very large if its config does not say."""
    length = model.config.get("max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else 1 << 30


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = time.perf_counter() - start
