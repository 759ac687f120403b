"""The whole path of one command: source → compress → merge → export → verify → measure."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli import expect, finish, plan, stages
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console
from losa_deploy.output import check_output, remove
from losa_deploy.pipeline import stamp_recipe, work_folder

if TYPE_CHECKING:
    from losa_deploy.compress.device import Room
    from losa_deploy.interfaces import Exporter, Shapes
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.sources.checkpoint import Checkpoint


def compress_and_export(args: argparse.Namespace, recipe: Recipe, console: Console) -> None:
    """Run all stages, reusing those in `<output>.work` that belong to the same run; print the report."""
    from losa_deploy import plugins

    exporter = plugins.load_exporter(args.format)
    output: Path = args.output or stages.default_output(args.model, recipe, args.format)
    check_output(output, overwrite=args.overwrite)
    work = work_folder(output)
    if args.dry_run:
        _dry_run(args, exporter, recipe, output, console)
        return
    room = expect.room(args)
    stages.require_runtime(exporter, recipe.export)
    console.info(f"Output: {output} (work in {work})")
    threads = thread_count(args)
    timings: dict[str, float] = {}
    with console.captured(work / finish.LOG):
        stages.set_threads(threads)
        with stages.timed(timings, "source"):
            source, record = stages.open_source(args, work, console)
        exporter.check_source(source, recipe.export)
        known = _compressed_before(work, record, recipe)
        _require(args, exporter, source, recipe, output, console, known=known)
        model = merged_model(source, record, recipe, work, timings, console, room=room)
        planned = exporter.plan(model, recipe.export)
        console.info(plan.line(planned, output))
        plan.require_resources(planned, output)
        job = finish.Job(
            exporter, model, planned, recipe, output, work, threads, args.overwrite,
            source=source, memory=args.memory if room.device.type == "cpu" else None, timings=timings,
        )  # fmt: skip
        report = finish.export_and_measure(job, console)
    if not args.keep_work:
        remove(work)
    finish.show(report, output, console, as_json=args.json)


def _require(
    args: argparse.Namespace,
    exporter: Exporter,
    source: Checkpoint,
    recipe: Recipe,
    output: Path,
    console: Console,
    *,
    known: bool,
) -> None:
    """Say what the run will roughly write and need, and refuse what does not fit.

    `known`: the model is compressed already, here or elsewhere, so that this takes nothing.
    """
    shapes = checkpoint_shapes(source)
    if not known:
        first = expect.expected(args, *shapes, recipe)
        console.info(expect.line(first))
        expect.require(first, output, expect.budget(args))
    expected = plan.estimate(exporter, *shapes, recipe, _host_memory(args))
    console.info(f"{plan.line(expected, output)} (estimated)")
    plan.require_resources(expected, output)


def _compressed_before(work: Path, record: SourceRecord, recipe: Recipe) -> bool:
    """Whether `work` holds the whole compression of this source by this recipe."""
    from losa_deploy.compress.adapted import fingerprint, read_state
    from losa_deploy.errors import InputError

    if stages.merged_before(work / "merged", record, recipe):
        return True
    try:
        state = read_state(work / "adapted") if (work / "adapted").is_dir() else None
    except InputError:
        return False
    return state is not None and state.complete and state.fingerprint == fingerprint(record.files, recipe)


def _host_memory(args: argparse.Namespace) -> int:
    """Bytes for what runs on the CPU after the compression."""
    from losa_deploy.compress.memory import available_bytes

    on_cpu = args.memory if expect.room(args).device.type == "cpu" else None
    return on_cpu or available_bytes()


def merged_model(
    source: Checkpoint,
    record: SourceRecord,
    recipe: Recipe,
    work: Path,
    timings: dict[str, float],
    console: Console,
    *,
    texts: Path | None = None,
    room: Room | None = None,
) -> SparseModel:
    """The merged model in `work`: reused if it is of this source and recipe, otherwise made.

    See `compress` for `texts` and `room`.
    """
    from losa_deploy.model import SparseModel
    from losa_deploy.seal import seal

    folder = work / "merged"
    if stages.merged_before(folder, record, recipe) and stages.is_intact(folder, "merging", console):
        console.info(f"Compressed and merged before, reusing {folder}")
        stamp_recipe(folder, recipe)
        seal(folder)
        return SparseModel.open(folder)
    remove(folder)  # whatever it is: the folder is ours, and not what is needed
    with stages.timed(timings, "compress"):
        adapted = stages.run_compress(
            source, record, recipe, work / "adapted", console, texts=texts, room=room
        )
    with stages.timed(timings, "merge"):
        model = stages.run_merge(source, record, adapted, folder, console, overwrite=True)
    seal(folder)
    return model


def _dry_run(
    args: argparse.Namespace, exporter: Exporter, recipe: Recipe, output: Path, console: Console
) -> None:
    """The exporter's plan if a merged model of this recipe is there, else an estimate from shapes.

    Writes nothing, downloads nothing.
    """
    from losa_deploy.assemble import check_tensors
    from losa_deploy.manifest import Manifest
    from losa_deploy.model import SparseModel
    from losa_deploy.sources.checkpoint import Checkpoint

    merged = work_folder(output) / "merged"
    if merged.is_dir() and stages.merged_before(merged, Manifest.read(merged).source, recipe):
        model = SparseModel.open(merged)
        plan.show(exporter.plan(model, recipe.export), output, console, as_json=args.json)
        return
    path = _located(args)
    if path.is_dir():
        checkpoint = Checkpoint.open(path)
        check_tensors(checkpoint)
        exporter.check_source(checkpoint, recipe.export)
    linears, others = source_shapes(args)
    planned = plan.estimate(exporter, linears, others, recipe, _host_memory(args))
    first = expect.expected(args, linears, others, recipe)
    plan.show(planned, output, console, as_json=args.json, estimated=True, first=first)
    expect.require(first, output, expect.budget(args))


def source_shapes(args: argparse.Namespace) -> tuple[Shapes, Shapes]:
    """Shapes (out, in) of the block linears, and of embedding and head, from headers only."""
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.sources.locate import file_shapes

    path = _located(args)
    if path.is_file():
        return file_shapes(path)
    return checkpoint_shapes(Checkpoint.open(path))


def _located(args: argparse.Namespace) -> Path:
    """The source on this machine."""
    from losa_deploy.progress import no_progress
    from losa_deploy.sources.locate import locate

    return locate(
        args.model, revision=args.revision, offline=True, cache_dir=args.cache_dir, progress=no_progress
    ).path


def checkpoint_shapes(checkpoint: Checkpoint) -> tuple[Shapes, Shapes]:
    """Shapes (out, in) of the block linears, and of embedding and head (once if tied)."""
    names = [checkpoint.family.embedding] + ([] if checkpoint.tied else [checkpoint.family.head])
    shapes = {name: checkpoint.shape(f"{name}.weight") for name in names}
    return checkpoint.linears, {name: (shape[0], shape[1]) for name, shape in shapes.items()}
