"""The last stages, which two commands share: export, verify, measure, report, publish."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.artifact import staged_output
from losa_deploy.cli import stages
from losa_deploy.console import Console
from losa_deploy.errors import GateError

if TYPE_CHECKING:
    from losa_deploy.checkpoint import Checkpoint
    from losa_deploy.interfaces import Exporter
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.verify import Parity


@dataclass(frozen=True)
class Job:
    """One export: what goes where."""

    exporter: Exporter
    model: SparseModel
    recipe: Recipe
    output: Path
    work: Path
    threads: int
    overwrite: bool


def export_and_measure(job: Job, source: Checkpoint | None, console: Console) -> None:
    """Export into a staged folder, verify and measure it there, then publish it in one move.

    `source` is the dense model if it is at hand. Raises `GateError` (the artifact is kept as
    `<output>.failed`) if the artifact does not compute the merged model.
    """
    with staged_output(job.output, overwrite=job.overwrite) as folder:
        with console.stage("export") as progress:
            job.exporter.export(job.model, job.recipe.export, folder, progress)
        stages.stamp_recipe(folder, job.recipe)
        parity = _verified(job, folder, console)
        log = job.work / "export.log"
        if log.is_file():
            shutil.copyfile(log, folder / "export.log")


def _verified(job: Job, folder: Path, console: Console) -> Parity | None:
    """Parity with the merged model, None at level `off`."""
    if job.recipe.verify.level == "off":
        console.warn("--verify off: nobody has checked that the artifact computes the merged model.")
        return None
    runtime = stages.pick_runtime(folder, None)
    parity = stages.run_verify(folder, job.model, job.exporter, runtime, job.recipe, job.threads, console)
    for tie in parity.ties:
        console.detail(f"Undecided token: {tie}")
    if not parity.ok:
        raise GateError(
            f"The exported model is not the merged one: {parity.reasons[0]}.",
            hint="Please report this with the folder's losa.json and export.log.",
            details={"failed_checks": len(parity.reasons)},
        )
    return parity


def show(report: None, output: Path, console: Console, *, as_json: bool) -> None:
    console.result(str(output))
