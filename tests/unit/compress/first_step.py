"""What processes add up before an optimizer moves anything: `torchrun … first_step.py SOURCE CASES FOLDER`.

Optimizers divide a gradient by its size, so that one near zero, which is rounding, moves a weight as far as
a large one: results differ by more than rounding. What goes into the first step does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save_file

from losa_deploy.compress import schedule
from losa_deploy.compress.device import CPU, Room
from losa_deploy.compress.prune import InputStatistics
from losa_deploy.compress.team import Team, joined
from losa_deploy.compress.train import Trained
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint


class Reached(Exception):
    """The first step of an optimizer is due."""


@contextmanager
def recorded(found: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put input moments and the first step's gradients, as they are used, into `found`; then `Reached`.

    `raw` gradients are those that were added up; afterwards those of pruned weights go, and the rest is
    shortened, which makes it the same for gradients that are twice as long.
    """
    add_up, clip = InputStatistics.add_up, Trained.clip

    def moments(self: InputStatistics, team: Team) -> None:
        add_up(self, team)
        number = len(found)
        found[f"squares {number}"] = self.squares.clone()
        if self.hessian is not None:
            found[f"hessian {number}"] = self.hessian.clone()

    def gradients(self: Trained, limit: float) -> NoReturn:
        found.update(whole_gradients(self, "raw"))
        clip(self, limit)
        found.update(whole_gradients(self, "gradient"))
        raise Reached

    InputStatistics.add_up, Trained.clip = moments, gradients  # type: ignore[method-assign]
    try:
        yield
    finally:
        InputStatistics.add_up, Trained.clip = add_up, clip  # type: ignore[method-assign]


def whole_gradients(trained: Trained, label: str) -> dict[str, torch.Tensor]:
    """The gradient of each parameter, put together where processes have rows of it."""
    found = {}
    for number, parameter in enumerate(trained.parameters):
        assert parameter.grad is not None
        whole = getattr(parameter.grad, "full_tensor", parameter.grad.clone)
        found[f"{label} {number}"] = whole()
    return found


def first_step(source: Path, chosen: Recipe, room: Room, folder: Path) -> dict[str, torch.Tensor]:
    """Compress until the first step of an optimizer; `folder` is left unfinished."""
    found: dict[str, torch.Tensor] = {}
    record = SourceRecord(id="someone/tiny")
    try:
        with recorded(found):
            schedule.compress(
                Checkpoint.open(source), record, chosen, folder, progress=no_progress, room=room
            )
    except Reached:
        return found
    raise AssertionError("nothing was trained")


def main(source: Path, cases: Path, folder: Path) -> None:
    """Of every case in `cases`, [{recipe, memory}, …], write what the processes have together."""
    torch.set_num_threads(1)
    with joined(CPU) as team:
        for number, case in enumerate(json.loads(cases.read_text("utf-8"))):
            room = Room(memory=case["memory"], team=team)
            chosen = Recipe.model_validate(case["recipe"])
            found = first_step(source, chosen, room, folder / f"adapted-{number}")
            if team.leads:
                save_file(found, folder / f"{number}.safetensors")
            team.wait()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
