"""A compression by several processes: `torchrun --nproc-per-node N together.py SOURCE RECIPE FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from losa_deploy.compress import partial, schedule, tune
from losa_deploy.compress.device import CPU, Room
from losa_deploy.compress.team import joined
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint


def main(source: Path, recipe: Path, folder: Path) -> None:
    """Write beside the result how many processes there were, in how many phases they shared out weights, and
    how many steps were made through the model.

    MEMORY is what each may take; DIES=N ends the first process at its progress call N; with EAGER=1 a point
    is saved after every step.
    """
    if "EAGER" in os.environ:
        partial.SAVE_SECONDS = -1.0
    torch.set_num_threads(1)
    chosen = Recipe.model_validate_json(recipe.read_text("utf-8"))
    shared: list[object] = []
    share = schedule.shared_out
    schedule.shared_out = lambda *arguments: shared.append(0) or share(*arguments)  # type: ignore[func-returns-value]
    steps: list[object] = []
    step = tune._step
    tune._step = lambda *arguments: steps.append(0) or step(*arguments)  # type: ignore[func-returns-value]
    memory = int(os.environ.get("MEMORY", "0")) or None
    with joined(CPU) as team:
        progress = dying(int(os.environ["DIES"])) if team.leads and "DIES" in os.environ else no_progress
        schedule.compress(
            Checkpoint.open(source), SourceRecord(id="someone/tiny"), chosen, folder,
            progress=progress, room=Room(memory=memory, team=team),
        )  # fmt: skip
        if team.leads:
            folder.with_suffix(".count").write_text(f"{team.count} {len(shared)} {len(steps)}", "utf-8")


def dying(after: int) -> Progress:
    """A progress callback that kills the process."""
    calls = 0

    def progress(done: int, total: int, label: str) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            os._exit(9)

    return progress


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
