"""The stages as the commands run them: with progress, staging, reuse and messages."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.flags import is_offline
from losa_deploy.console import Console
from losa_deploy.errors import InputError, UsageError
from losa_deploy.output import remove, require_disk, sibling, staged_output

if TYPE_CHECKING:
    from losa_deploy.compress.adapted import AdaptedModel, AdaptedState
    from losa_deploy.compress.device import Room
    from losa_deploy.interfaces import Exporter, Runtime
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.verify.check import Parity

WORK = ".work"
PREFERRED_RUNTIMES = ("ort", "genai", "llamacpp", "reference")
"""Which runtime opens a folder when several can and `--runtime` says nothing."""


def work_folder(output: Path) -> Path:
    """`<output>.work`: the converted source, the resume state, the merged model."""
    return sibling(output.absolute(), WORK)


def enclosing_work_folder(path: Path) -> Path:
    """The work folder that `path` lies in, or its own."""
    parent = path.absolute().parent
    return parent if parent.name.endswith(WORK) else work_folder(path)


def default_output(model: str | None, recipe: Recipe, suffix: str) -> Path:
    """`./<name>-losa-<sparsity>-<suffix>`."""
    from losa_deploy.sources.locate import model_name

    return Path(f"{model_name(model)}-losa-{recipe.sparsity.target:g}-{suffix}")


def open_source(args: argparse.Namespace, work: Path, console: Console) -> tuple[Checkpoint, SourceRecord]:
    """The `source` stage: what `--model` names, opened."""
    from losa_deploy.sources.locate import load_source

    with console.stage("source") as progress:
        checkpoint, record = load_source(
            args.model,
            revision=args.revision,
            work=work,
            offline=is_offline(args),
            cache_dir=args.cache_dir,
            progress=progress,
            warn=console.warn,
        )
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


def check_state_folder(folder: Path) -> None:
    """Raise `UsageError` if `folder` is in use for something else than compression."""
    from losa_deploy.compress.adapted import STATE_FILE

    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / STATE_FILE).is_file()
    ):
        raise UsageError(
            f"{folder} exists and is not the state of a compression, so losa-deploy will not delete it.",
            hint="Choose another --output.",
        )


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
    from losa_deploy.compress.adapted import fingerprint
    from losa_deploy.compress.device import HERE
    from losa_deploy.compress.schedule import compress

    check_state_folder(folder)
    room = room or HERE
    state = room.team.after_the_first(lambda: _undamaged_state(folder, console))
    if state is not None and state.fingerprint != fingerprint(record.files, recipe):
        console.info(f"{folder} was made from another source, recipe, text or seed: compressing again.")
    elif state is not None and state.complete:
        console.info(f"Compressed before, reusing {folder}")
    elif state is not None:
        console.info(f"Resuming after step {state.step} of {state.recipe.schedule.steps} in {folder}")
    weights = sum(path.stat().st_size for path in set(source.files.values()))
    require_disk(folder, 2 * weights, "The compression state")
    with console.stage("compress") as progress:
        adapted = compress(source, record, recipe, folder, progress=progress, texts=texts, room=room)
    # The state may stem from a run with other merge and export choices.
    return dataclasses.replace(adapted, state=adapted.state.model_copy(update={"recipe": recipe}))


def _undamaged_state(folder: Path, console: Console) -> AdaptedState | None:
    """The state of `folder`, which is deleted if it is damaged."""
    from losa_deploy.compress.adapted import read_state

    try:
        return read_state(folder) if folder.is_dir() else None
    except InputError as error:
        console.warn(f"{error.message.rstrip('.')}: compressing again.")
        remove(folder)
        return None


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
    from losa_deploy.merge import merge
    from losa_deploy.model import SparseModel

    made_from = adapted.state.source.files
    differing = sorted(set(made_from.items()) ^ set(record.files.items()))
    if differing:
        raise InputError(
            f"{adapted.folder} was not made from {record.id}: {differing[0][0]} differs.",
            hint=f"Give --model the model it was made from: {adapted.state.source.id}.",
        )
    weights = sum(path.stat().st_size for path in set(source.files.values()))
    require_disk(output, weights + weights // 16, "The merged model")
    with staged_output(output, overwrite=overwrite) as folder, console.stage("merge") as progress:
        merge(source, adapted, folder, progress=progress)
    return SparseModel.open(output)


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


def require_intact(model: SparseModel) -> None:
    """Raise `GateError` if a file of a merged model is not the one that its `losa.json` has the hash of."""
    from losa_deploy.errors import GateError
    from losa_deploy.verify.stored import check_files

    findings = check_files(model.folder, model.manifest)
    if findings:
        raise GateError(
            f"{model.folder} is damaged: {findings[0]}.",
            hint="Merge the model again, or copy the folder again if it was moved.",
            details={"failed_checks": len(findings)},
        )


def stamp_recipe(folder: Path, recipe: Recipe) -> None:
    """Let `losa.json` of a staged folder carry the recipe that was in effect."""
    from losa_deploy.manifest import Manifest

    manifest = Manifest.read(folder)
    if manifest.recipe != recipe:
        manifest.model_copy(update={"recipe": recipe}).write(folder)


def pick_runtime(folder: Path, name: str | None) -> Runtime:
    """The runtime called `name`, or the first preferred one that can open `folder` (or a GGUF file)."""
    from losa_deploy import plugins

    if name is not None:
        runtime = plugins.load_runtime(name)
        if not runtime.supports(folder):
            raise InputError(f"The runtime {name} cannot open {folder}.", hint="Leave --runtime out.")
        return runtime
    if not folder.exists():
        raise InputError(
            f"There is no folder {folder}.",
            hint="Give the output folder of an export or merge, or a GGUF file.",
        )
    installed = plugins.runtimes()
    ordered = [n for n in PREFERRED_RUNTIMES if n in installed]
    ordered += [n for n in installed if n not in PREFERRED_RUNTIMES]
    for candidate in ordered:
        runtime = plugins.load_runtime(candidate)
        if runtime.supports(folder):
            return runtime
    raise InputError(
        f"No installed runtime ({', '.join(ordered)}) can open {folder}.",
        hint="Give a folder with model.onnx, a GGUF file or safetensors weights.",
    )


def warn_of_fallback(runtime: Runtime, console: Console) -> None:
    """Say if the model that `runtime` opened last runs without our kernels."""
    reason = getattr(runtime, "fallback", "")
    if reason:
        console.warn(f"{runtime.name} runs without our kernels: {reason}")


def require_runtime(exporter: str, packed: bool) -> None:
    """Raise `MissingError` if this machine cannot open what is to be exported; called before any work."""
    if exporter != "gguf":
        return
    from losa_deploy.bindings.llama_cpp import load
    from losa_deploy.errors import MissingError
    from losa_deploy.runtimes.llamacpp.backend import attach

    load()
    backend = attach()
    if packed and backend.reason:
        raise MissingError(
            f"A packed GGUF cannot be checked here, because our backend cannot be used: {backend.reason}",
            hint="Leave --packed out, or see `losa-deploy doctor`.",
        )


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
