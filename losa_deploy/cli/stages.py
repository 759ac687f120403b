"""The stages as the commands run them: with progress, staging, reuse and messages."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy import pipeline
from losa_deploy.cli.flags import is_offline
from losa_deploy.console import Console
from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from losa_deploy.compress.adapted import AdaptedModel
    from losa_deploy.compress.device import Room
    from losa_deploy.interfaces import Exporter, Runtime
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import ExportRecipe, Recipe
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.verify.check import Parity


def enclosing_work_folder(path: Path) -> Path:
    """The work folder that `path` lies in, or its own."""
    parent = path.absolute().parent
    return parent if parent.name.endswith(pipeline.WORK) else pipeline.work_folder(path)


def default_output(model: str | None, recipe: Recipe, suffix: str) -> Path:
    """`./<name>-losa-<sparsity>-<suffix>`."""
    from losa_deploy.sources.locate import model_name

    return Path(f"{model_name(model)}-losa-{recipe.sparsity.target:g}-{suffix}")


def open_source(args: argparse.Namespace, work: Path, console: Console) -> tuple[Checkpoint, SourceRecord]:
    """The `source` stage: what `--model` names, opened."""
    with console.stage("source") as progress:
        found = pipeline.load_source(
            args.model,
            revision=args.revision,
            work=work,
            offline=is_offline(args),
            cache_dir=args.cache_dir,
            progress=progress,
            warn=console.warn,
        )
    checkpoint, record = found.checkpoint, found.record
    revision = f" @ {record.revision}" if record.revision else ""
    console.info(
        f"Source: {record.id}{revision}, family {checkpoint.family.name}, {checkpoint.block_count} blocks"
    )
    return checkpoint, record


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds of the block to `timings`."""
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - start


def set_threads(threads: int) -> None:
    """Let torch compute with so many threads."""
    import torch

    torch.set_num_threads(threads)


def run_compress(
    source: Checkpoint,
    record: SourceRecord,
    recipe: Recipe,
    folder: Path,
    console: Console,
    *,
    texts: Path | None = None,
    room: Room | None = None,
) -> AdaptedModel:
    """The `compress` stage: continues or reuses `folder` if it belongs to the same run; see `compress`."""
    with console.stage("compress") as progress:
        return pipeline.compress(
            pipeline.Source(source, record), folder, recipe,
            room=room, texts=texts, progress=progress, tell=console.info, warn=console.warn,
        )  # fmt: skip


def run_merge(
    source: Checkpoint,
    record: SourceRecord,
    adapted: AdaptedModel,
    output: Path,
    console: Console,
    *,
    overwrite: bool,
) -> SparseModel:
    """The `merge` stage, staged; a failed proof is a `GateError` and keeps `<output>.failed`."""
    with console.stage("merge") as progress:
        found = pipeline.Source(source, record)
        return pipeline.merge(found, adapted, output, overwrite=overwrite, progress=progress)


def merged_before(folder: Path, record: SourceRecord, recipe: Recipe) -> bool:
    """True if `folder` says that it is a merged model of exactly this source, recipe and program version."""
    from losa_deploy import __version__
    from losa_deploy.manifest import Manifest

    if not folder.is_dir():
        return False
    try:
        manifest = Manifest.read(folder)
    except InputError:
        return False
    later = {"preset", "export", "verify"}
    same_recipe = manifest.recipe.model_dump(exclude=later) == recipe.model_dump(exclude=later)
    proved = manifest.merge_proof is not None and manifest.merge_proof.ok
    return same_recipe and proved and manifest.source == record and manifest.tool_version == __version__


def is_intact(folder: Path, again: str, console: Console) -> bool:
    """True if a folder of an earlier run is as it was written; otherwise say so, and what happens `again`."""
    from losa_deploy.seal import damage

    found = damage(folder)
    if found:
        console.warn(f"{found}: {again} again.")
    return not found


def warn_of_fallback(runtime: Runtime, console: Console) -> None:
    """Say if the model that `runtime` opened last runs without our kernels."""
    if runtime.fallback:
        console.warn(f"{runtime.name} runs without our kernels: {runtime.fallback}")


def require_runtime(exporter: Exporter, recipe: ExportRecipe) -> None:
    """Raise `MissingError` if this machine cannot open what is to be exported; called before any work."""
    from losa_deploy import plugins

    plugins.load_runtime(exporter.runtime).require(packed=recipe.packed)


def run_verify(
    folder: Path,
    model: SparseModel,
    exporter: Exporter,
    runtime: Runtime,
    recipe: Recipe,
    threads: int,
    console: Console,
    memory: int | None = None,
) -> Parity:
    """The parity of an exported folder with the merged model, judged in torch."""
    from losa_deploy.verify.check import verify_export

    console.info(f"Verifying in {runtime.name} against the merged model in torch …")
    return verify_export(folder, model, exporter, runtime, recipe.verify, threads=threads, memory=memory)
