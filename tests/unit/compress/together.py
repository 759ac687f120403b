"""A compression by several processes: `torchrun --nproc-per-node N together.py SOURCE RECIPE FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.compress.device import CPU, Room
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.team import joined
from losa_deploy.interfaces import Progress, no_progress
from losa_deploy.manifest import SourceRecord
from losa_deploy.recipe import Recipe


def main(source: Path, recipe: Path, folder: Path) -> None:
    """Write the number of processes beside the result; DIES=N ends the first process at progress call N."""
    torch.set_num_threads(1)
    chosen = Recipe.model_validate_json(recipe.read_text("utf-8"))
    with joined(CPU) as team:
        progress = dying(int(os.environ["DIES"])) if team.leads and "DIES" in os.environ else no_progress
        compress(
            Checkpoint.open(source), SourceRecord(id="someone/tiny"), chosen, folder,
            progress=progress, room=Room(team=team),
        )  # fmt: skip
        if team.leads:
            folder.with_suffix(".count").write_text(str(team.count), "utf-8")


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
