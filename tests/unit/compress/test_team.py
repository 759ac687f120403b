"""Several processes together give what one gives, to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

import pytest
import torch

from losa_deploy.compress.device import CPU
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.team import ALONE, Team, joined
from losa_deploy.errors import UsageError
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

Stored = Callable[[Path], dict[str, torch.Tensor]]
Distance = Callable[[torch.Tensor, torch.Tensor], float]
TOGETHER = Path(__file__).with_name("together.py")
BASE = {"calibration.samples": 14, "calibration.sequence_length": 24, "precision": "f32"}
BLOCKS = {
    "train": ["weights", "scales"],
    "grid": "export",
    "tokens": 600,
    "window": 2,
    "batch_size": 4,
    "learning_rate": 0.002,
}
NORMS = {"train": ["norms"], "where": "model", "grid": "export", "tokens": 400}
WEIGHTS = {
    "train": ["weights", "scales"],
    "where": "model",
    "grid": "export",
    "tokens": 800,
    "batch_size": 3,
    "rate": "probe",
    "learning_rate": 0.002,
    "loss": {"kl": 1.0, "ce": 0.2},
}
ADAPTERS = {"train": ["adapters"], "where": "model", "tokens": 400}
ON_GRID, ELSEWHERE = 0.08, 0.0002
"""What may differ: on a grid the last bit of a sum can decide between two levels, or the sign of a scale."""
RECIPES: Mapping[str, tuple[int, float, Mapping[str, object]]] = {
    "quick": (2, ON_GRID, {"phases": [BLOCKS, NORMS]}),
    "three processes, batches of two, weights": (
        3,
        ON_GRID,
        {"calibration.samples": 7, "phases": [{**BLOCKS, "batch_size": 2, "rate": "probe"}, WEIGHTS]},
    ),
    "no grid": (
        2,
        ELSEWHERE,
        {"phases": [{"train": ["weights", "norms"], "tokens": 600}, {"where": "model", "tokens": 400}]},
    ),
    "weights shared out, three processes": (
        3,
        ON_GRID,
        {"phases": [BLOCKS, {**WEIGHTS, "train": ["weights", "scales", "norms"], "batch_size": 2}]},
    ),
    "weights shared out, no grid": (
        2,
        ELSEWHERE,
        {"phases": [{"where": "model", "tokens": 400, "batch_size": 5}, {"where": "model", "tokens": 200}]},
    ),
    "mixed 2:4, ranks, two steps": (
        2,
        ELSEWHERE,
        {
            "sparsity.pattern": "2:4",
            "prune.method": "wanda",
            "allocation.method": "rmi",
            "allocation.samples": 8,
            "schedule.steps": 2,
            "phases": [ADAPTERS],
        },
    ),
}


def torchrun(count: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def together(source: Path, chosen: Recipe, folder: Path, count: int, **environment: str) -> int:
    path = folder.with_suffix(".json")
    path.write_text(chosen.model_dump_json(), "utf-8")
    done = torchrun(count, str(TOGETHER), str(source), str(path), str(folder), **environment)
    assert done.returncode == 0 or "DIES" in environment, done.stderr[-3000:]
    return done.returncode


def counted(folder: Path) -> list[int]:
    """Processes, phases that shared out weights, steps through the model; see `together`."""
    return [int(word) for word in folder.with_suffix(".count").read_text().split()]


def alone(source: Path, chosen: Recipe, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = SourceRecord(id="someone/tiny")
        compress(Checkpoint.open(source), record, chosen, folder, progress=no_progress)
    finally:
        torch.set_num_threads(threads)


def unsigned(key: str, value: torch.Tensor) -> torch.Tensor:
    return value.abs() if key.endswith(".scales") else value


@pytest.mark.parametrize(
    "name", [name if name == "no grid" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_processes_give_what_one_gives(
    name: str, tiny_llama: Path, tmp_path: Path, stored: Stored, distance: Distance
) -> None:
    count, most, changes = RECIPES[name]
    chosen = load_recipe(overrides={**BASE, **changes}.items())
    shared = (
        len(chosen.phases) - ("phases" in changes and BLOCKS in changes["phases"]) if "shared" in name else 0
    )
    together(tiny_llama, chosen, tmp_path / "many", count, **({"MEMORY": "1"} if shared else {}))
    assert counted(tmp_path / "many")[:2] == [count, shared]
    alone(tiny_llama, chosen, tmp_path / "one")
    expected, found = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert found.keys() == expected.keys() and len(found) > 20
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert distance(unsigned(key, found[key]), unsigned(key, value)) < most, key


SAMPLING = 24
"""Progress calls before the first block."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phases", "dies", "left", "environment"),
    [
        ([BLOCKS], SAMPLING + 1, "block-00000.json", {}),
        ([WEIGHTS], SAMPLING + 3 + 5, "point-1-of-2-*.json", {"MEMORY": "1", "EAGER": "1"}),
        (
            [{**WEIGHTS, "tokens": 216, "rate": "relative"}, {**WEIGHTS, "tokens": 216, "rate": "relative"}],
            SAMPLING + 3 + 3 + 2,
            "phase-0.json",
            {"MEMORY": "1"},
        ),
    ],
    ids=["blocks", "inside a phase that shares out weights", "after such a phase"],
)
def test_processes_go_on_where_they_were_killed(
    phases: list[object],
    dies: int,
    left: str,
    environment: dict[str, str],
    tiny_llama: Path,
    tmp_path: Path,
    stored: Stored,
) -> None:
    chosen = load_recipe(overrides={**BASE, "phases": phases}.items())
    together(tiny_llama, chosen, tmp_path / "whole", 2, **environment)
    assert together(tiny_llama, chosen, tmp_path / "killed", 2, DIES=str(dies), **environment) != 0
    assert not (tmp_path / "killed.count").exists()
    assert list((tmp_path / "killed").rglob(left))
    together(tiny_llama, chosen, tmp_path / "killed", 2, **environment)
    assert not environment or counted(tmp_path / "killed")[2] < counted(tmp_path / "whole")[2]
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_rows_and_batches_are_dealt_out_completely() -> None:
    for count in (1, 2, 3, 5):
        teams = [Team(rank, count) for rank in range(count)]
        rows = torch.arange(11)
        owned = [team.rows(rows).tolist() for team in teams]
        assert sorted(chain(*owned)) == list(range(11))
        for whole in (slice(0, 4), slice(4, 8), slice(7, 11), slice(3, 4), slice(5, 5)):
            parts = [own[team.part(whole)] for team, own in zip(teams, owned, strict=True)]
            assert sorted(chain(*parts)) == list(range(11))[whole]
        batch = [9, 2, 4, 7, 2]
        assert sorted(chain(*(team.mine(batch) for team in teams))) == sorted(batch)
        for team, own in zip(teams, owned, strict=True):
            assert all(own[team.place(index)] == index for index in team.mine(range(11)))


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined(CPU) as team:
        assert team == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")  # alone it means nothing
    with joined(CPU) as team:
        assert team == ALONE
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UsageError, match="RANK is 'x', expected a number"), joined(CPU):
        pass
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UsageError, match="RANK is 4, but WORLD_SIZE 4"), joined(CPU):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="cannot share mps"), joined(torch.device("mps")):
        pass
