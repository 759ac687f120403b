"""The stages from a model to a report, for programs: what the commands do, without a command line.

Each stage takes what the one before returned, and the folder that it wrote is enough to start the next.
Everything raises a `LosaError`; outputs appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import GateError, InputError, UsageError
from losa_deploy.output import remove, require_disk, sibling, staged_output
from losa_deploy.progress import Progress, no_progress

if TYPE_CHECKING:
    from losa_deploy.benchmarks.accuracy import Perplexity
    from losa_deploy.benchmarks.literature import DenseDistance
    from losa_deploy.benchmarks.report.document import Report
    from losa_deploy.compress.adapted import AdaptedModel, AdaptedState
    from losa_deploy.compress.device import Room
    from losa_deploy.interfaces import ExportedModel, Runtime, Session
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.runtimes.generate import GenerateOptions
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.verify.judge import Parity

Tell = Callable[[str], None]
"""Hears a line that the user should know of."""
WORK = ".work"


def silent(line: str) -> None:
    """Tells nobody."""


def physical_cores() -> int:
    """How many physical cores this process may use: what `threads` is by default."""
    import psutil

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, psutil.cpu_count(logical=False) or available))


def work_folder(output: Path) -> Path:
    """`<output>.work`: the converted source, the resume state, the merged model."""
    return sibling(output.absolute(), WORK)


@dataclass(frozen=True)
class Source:
    """A dense model on this machine, and where it came from."""

    checkpoint: Checkpoint
    record: SourceRecord


def load_source(
    model: str | Path | None = None,
    *,
    work: str | Path,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
    warn: Tell = silent,
) -> Source:
    """A folder, a GGUF file, a hub id, or (None) the embedded model; `work` is for what has to be converted.

    Raises `InputError` for a path or model that cannot be used, `MissingError` if it would have to be
    fetched.
    """
    from losa_deploy.sources.locate import load_source as load

    checkpoint, record = load(
        None if model is None else str(model),
        revision=revision, work=Path(work), offline=offline, cache_dir=cache_dir,
        progress=progress, warn=warn,
    )  # fmt: skip
    return Source(checkpoint, record)


def compress(
    source: Source,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    room: Room | None = None,
    texts: Path | None = None,
    progress: Progress = no_progress,
    tell: Tell = silent,
    warn: Tell = silent,
) -> AdaptedModel:
    """Make a model sparse by a recipe (default: `quick`) in `folder`, going on there if it was interrupted.

    See `losa_deploy.compress.schedule.compress` for `room`, `texts` and errors; `UsageError` if `folder`
    is in use for something else.
    """
    from losa_deploy.compress.adapted import fingerprint
    from losa_deploy.compress.device import HERE
    from losa_deploy.compress.schedule import compress as run
    from losa_deploy.recipe import load_recipe

    folder, recipe, room = Path(folder), recipe or load_recipe(), room or HERE
    check_state_folder(folder)
    state = room.team.after_the_first(lambda: _undamaged_state(folder, warn))
    if state is not None and state.fingerprint != fingerprint(source.record.files, recipe):
        tell(f"{folder} was made from another source, recipe, text or seed: compressing again.")
    elif state is not None and state.complete:
        tell(f"Compressed before, reusing {folder}")
    elif state is not None:
        tell(f"Resuming after step {state.step} of {state.recipe.schedule.steps} in {folder}")
    require_disk(folder, 2 * _bytes(source.checkpoint), "The compression state")
    adapted = run(source.checkpoint, source.record, recipe, folder, progress=progress, texts=texts, room=room)
    # The state may stem from a run with other merge and export choices.
    return dataclasses.replace(adapted, state=adapted.state.model_copy(update={"recipe": recipe}))


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


def _undamaged_state(folder: Path, warn: Tell) -> AdaptedState | None:
    """The state of `folder`, which is deleted if it is damaged."""
    from losa_deploy.compress.adapted import read_state

    try:
        return read_state(folder) if folder.is_dir() else None
    except InputError as error:
        warn(f"{error.message.rstrip('.')}: compressing again.")
        remove(folder)
        return None


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in set(checkpoint.files.values()))


def merge(
    source: Source,
    adapted: AdaptedModel,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> SparseModel:
    """Merge adapters into an ordinary Hugging Face folder with exact zeros, and prove that nothing is lost.

    Raises `InputError` if `adapted` was made from another model, `GateError` (with the folder kept as
    `<output>.failed`) if the proof fails.
    """
    from losa_deploy.merge import merge as run
    from losa_deploy.model import SparseModel

    output, record = Path(output), source.record
    made_from = adapted.state.source.files
    differing = sorted(set(made_from.items()) ^ set(record.files.items()))
    if differing:
        raise InputError(
            f"{adapted.folder} was not made from {record.id}: {differing[0][0]} differs.",
            hint=f"Give --model the model it was made from: {adapted.state.source.id}.",
        )
    weights = _bytes(source.checkpoint)
    require_disk(output, weights + weights // 16, "The merged model")
    with staged_output(output, overwrite=overwrite) as folder:
        run(source.checkpoint, adapted, folder, progress=progress)
    return SparseModel.open(output)


def export(
    model: SparseModel,
    output: str | Path,
    *,
    format: str,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ExportedModel:
    """Write a merged model as an artifact, by its own recipe or another; `verify` checks it.

    Raises `UsageError` for an unknown format, `InputError` for a model that it cannot hold, `GateError` for a
    merged folder that is damaged.
    """
    from losa_deploy import plugins
    from losa_deploy.planned import export_planned

    output, recipe = Path(output), recipe or model.manifest.recipe
    exporter = plugins.load_exporter(format)
    planned = exporter.plan(model, recipe.export)
    require_intact(model)
    require_disk(output, planned.total_bytes, "The exported model")
    with staged_output(output, overwrite=overwrite) as folder:
        exported = export_planned(exporter, model, planned, folder, progress)
        stamp_recipe(folder, recipe)
    return dataclasses.replace(exported, folder=output)


def require_intact(model: SparseModel) -> None:
    """Raise `GateError` if a file of a merged model is not the one that its `losa.json` has the hash of."""
    from losa_deploy.plugins import weight_suffixes
    from losa_deploy.verify.stored import check_files

    findings = check_files(model.folder, model.manifest, weight_suffixes())
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


def pick_runtime(folder: Path, name: str | None = None) -> Runtime:
    """The runtime called `name`, or of those that can open `folder` (or a file) the preferred one."""
    from losa_deploy import plugins

    if name is not None:
        runtime = plugins.load_runtime(name)
        if not runtime.supports(folder):
            raise InputError(f"The runtime {name} cannot open {folder}.", hint="Leave --runtime out.")
        return runtime
    if not folder.exists():
        raise InputError(
            f"There is no folder {folder}.",
            hint="Give the output of an export or merge.",
        )
    installed = plugins.usable_runtimes()
    for runtime in installed:
        if runtime.supports(folder):
            return runtime
    raise InputError(
        f"No installed runtime ({', '.join(runtime.name for runtime in installed)}) can open {folder}.",
        hint=f"Give {' or '.join(dict.fromkeys(runtime.opens for runtime in installed))}.",
    )


def open_session(path: str | Path, *, runtime: str | None = None, threads: int = 0) -> Session:
    """Open an exported or merged folder, or a model file; close the session when done."""
    return pick_runtime(Path(path), runtime).open(Path(path), threads=threads)


def generate(
    path: str | Path,
    prompt: str,
    *,
    options: GenerateOptions | None = None,
    stop: Sequence[str] = (),
    runtime: str | None = None,
    threads: int = 0,
) -> Iterator[str]:
    """Continue a prompt with a model on disk, piece by piece; it ends before the first of the `stop` texts.

    Without `options` up to 256 likeliest tokens, until the model ends the text itself.
    """
    from losa_deploy.runtimes.generate import GenerateOptions, stream_text
    from losa_deploy.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(path))
    options = options or GenerateOptions(max_tokens=256, stop_ids=tokenizer.eos_ids)
    with closing(open_session(path, runtime=runtime, threads=threads)) as session:
        yield from stream_text(session, tokenizer, tokenizer.encode(prompt), options, stop)


def verify(
    path: str | Path,
    model: SparseModel,
    *,
    recipe: Recipe | None = None,
    runtime: str | None = None,
    threads: int = 0,
    memory: int | None = None,
) -> Parity:
    """Whether an exported folder computes the merged model it was made from; see `verify_export`.

    A failed check is in `reasons` of the result, it does not raise.
    """
    from losa_deploy import plugins
    from losa_deploy.manifest import Manifest
    from losa_deploy.verify.check import verify_export

    path = Path(path)
    manifest = Manifest.read(path)
    chosen = (recipe or manifest.recipe).verify
    exporter, opener = plugins.load_exporter(manifest.format), pick_runtime(path, runtime)
    return verify_export(path, model, exporter, opener, chosen, threads=threads, memory=memory)


def evaluate(
    path: str | Path,
    text: str,
    *,
    dense: str | Path | None = None,
    window: int = 2048,
    text_tokens: int = 16384,
    runtime: str | None = None,
    threads: int = 0,
    progress: Progress = no_progress,
) -> tuple[Perplexity, DenseDistance | None]:
    """Perplexity of a model on disk on a text, as the literature computes it; its distance from `dense`."""
    from contextlib import nullcontext

    from losa_deploy.benchmarks.literature import literature_windows, score_text
    from losa_deploy.text.tokenizer import load_tokenizer

    windows = literature_windows(load_tokenizer(Path(path)), text, window, text_tokens)
    other = nullcontext() if dense is None else closing(open_session(dense, threads=threads))
    with closing(open_session(path, runtime=runtime, threads=threads)) as session, other as dense_session:
        return score_text(session, windows, dense_session, progress)


def measure(
    path: str | Path,
    model: SparseModel,
    *,
    source: Source | None = None,
    parity: Parity | None = None,
    work: str | Path | None = None,
    recipe: Recipe | None = None,
    threads: int = 0,
    memory: int | None = None,
    progress: Progress = no_progress,
    warn: Tell = silent,
) -> Report:
    """Size, quality and speed of an exported folder beside the dense model and llama.cpp's Q4_0 of it.

    `parity` is what `verify` found. `work` (default: `<path>.work`) keeps what they are compared with.
    """
    from losa_deploy import plugins
    from losa_deploy.benchmarks.report import assemble
    from losa_deploy.benchmarks.report.measure import measure as run
    from losa_deploy.manifest import Manifest

    path = Path(path)
    manifest = Manifest.read(path)
    job = assemble.Job(
        source=source.checkpoint if source else None,
        model=model,
        exported=path,
        exporter=plugins.load_exporter(manifest.format),
        runtime=pick_runtime(path),
        work=Path(work) if work else work_folder(path),
        recipe=recipe or manifest.recipe,
        threads=threads or physical_cores(),
        memory=memory,
        warn=warn,
    )
    return run(job, parity, progress=progress)
