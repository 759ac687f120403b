"""The last stages, which two commands share: export, verify, measure, report, publish."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli import stages
from losa_deploy.console import Console, table
from losa_deploy.errors import GateError
from losa_deploy.output import staged_output
from losa_deploy.pipeline import pick_runtime, stamp_recipe

if TYPE_CHECKING:
    from losa_deploy.benchmarks.report.assemble import Job as Measurement
    from losa_deploy.benchmarks.report.document import Report
    from losa_deploy.interfaces import Exporter, ExportPlan, Runtime
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.verify.check import Parity

LOG = "export.log"


@dataclass(frozen=True)
class Job:
    """One export: what goes where."""

    exporter: Exporter
    model: SparseModel
    plan: ExportPlan
    recipe: Recipe
    output: Path
    work: Path
    threads: int
    overwrite: bool
    source: Checkpoint | None = None
    """The dense model, if it is at hand."""
    memory: int | None = None
    """Bytes that the dense model may take beside the others; None: what is free."""
    timings: dict[str, float] = field(default_factory=dict)
    """Stage → seconds; the stages here add theirs."""


def export_and_measure(job: Job, console: Console) -> Report:
    """Export into a staged folder, verify and measure it there, then publish it in one move.

    Raises `GateError` (the artifact is kept as `<output>.failed`) if the artifact does not compute
    the merged model.
    """
    from losa_deploy.benchmarks.report.measure import measure
    from losa_deploy.card import write_card
    from losa_deploy.manifest import Manifest
    from losa_deploy.planned import export_planned

    with staged_output(job.output, overwrite=job.overwrite) as folder:
        with stages.timed(job.timings, "export"), console.stage("export") as progress:
            exported = export_planned(job.exporter, job.model, job.plan, folder, progress)
        for note in exported.notes:
            console.info(note)
        stamp_recipe(folder, job.recipe)
        (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), "utf-8")
        runtime = pick_runtime(folder, None)
        with stages.timed(job.timings, "verify"):
            parity = _verified(job, folder, runtime, console)
        stages.warn_of_fallback(runtime, console)
        with console.stage("measure") as progress:
            report = measure(
                _measurement(job, folder, runtime, console), parity, timings=job.timings, progress=progress
            )
        report.write(folder)
        notes = job.exporter.card(job.recipe.export)
        write_card(folder, Manifest.read(folder), report.card(), notes, previous=job.output)
        log = job.work / LOG
        if log.is_file():
            shutil.copyfile(log, folder / LOG)
    return report


def _verified(job: Job, folder: Path, runtime: Runtime, console: Console) -> Parity | None:
    """Parity with the merged model, None at level `off`."""
    if job.recipe.verify.level == "off":
        console.warn("--verify off: nothing has checked that the artifact computes the merged model.")
        return None
    parity = stages.run_verify(
        folder, job.model, job.exporter, runtime, job.recipe, job.threads, console, job.memory
    )
    for tie in parity.ties:
        console.detail(f"Undecided token: {tie}")
    if not parity.ok:
        raise GateError(
            f"The exported model is not the merged one: {parity.reasons[0]}.",
            hint="Please report this with losa.json and export.log of the kept folder.",
            details={"failed_checks": len(parity.reasons)},
        )
    return parity


def _measurement(job: Job, folder: Path, runtime: Runtime, console: Console) -> Measurement:
    from losa_deploy.benchmarks.report import assemble

    return assemble.Job(
        source=job.source,
        model=job.model,
        exported=folder,
        exporter=job.exporter,
        runtime=runtime,
        work=job.work,
        recipe=job.recipe,
        threads=job.threads,
        memory=job.memory,
        warn=console.warn,
    )


def show(report: Report, output: Path, console: Console, *, as_json: bool) -> None:
    """The result of a run: its table and verdict (at most 15 lines), then the folder; or the report.

    Of the verdict the lines on size and speed, and the last, on what people would run otherwise.
    """
    if as_json:
        console.result_json(report.to_json())
        return
    console.result(table(report.header(), report.table()))
    for line in (*report.verdict.lines[:2], report.verdict.lines[-1]):
        console.result(line)
    console.result(str(output))
    console.info(f"Report: {output / 'report.md'}. Next: losa-deploy chat -m {output}")
