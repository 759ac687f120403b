"""Several processes together give what one gives, to rounding."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file

from losa_deploy.compress.device import CPU, Room
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.team import ALONE, Team, joined
from losa_deploy.errors import UsageError
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

Together = Callable[..., int]
Stored = Callable[[Path], dict[str, torch.Tensor]]
Distance = Callable[[torch.Tensor, torch.Tensor], float]
FirstStep = Callable[[Path, Recipe, Room, Path], dict[str, torch.Tensor]]
FIRST_STEP = Path(__file__).with_name("first_step.py")
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
ON_GRID, CHOSEN, UNMOVED_BY_SUMS = 0.1, 0.002, 0.0002
"""What may differ: on a grid the last bit of a sum can decide between two levels (0.081 seen), or a sign;
where activations choose the mask, which of two weights is kept (1e-4 seen). Elsewhere it is rounding (4e-6
seen). What is added up is compared more closely, before the first step of an optimizer."""
UNMOVED = {"prune.method": "magnitude"}
"""The mask does not hang on sums: SparseGPT can choose otherwise by their last bits, which counts 0.02."""
RECIPES: Mapping[str, tuple[int, float, Mapping[str, object]]] = {
    "quick": (2, ON_GRID, {"phases": [BLOCKS, NORMS]}),
    "three processes, batches of two, weights": (
        3,
        ON_GRID,
        {"calibration.samples": 7, "phases": [{**BLOCKS, "batch_size": 2, "rate": "probe"}, WEIGHTS]},
    ),
    "no grid": (
        2,
        UNMOVED_BY_SUMS,
        {
            **UNMOVED,
            "phases": [{"train": ["weights", "norms"], "tokens": 600}, {"where": "model", "tokens": 400}],
        },
    ),
    "weights shared out, three processes": (
        3,
        ON_GRID,
        {"phases": [BLOCKS, {**WEIGHTS, "train": ["weights", "scales", "norms"], "batch_size": 2}]},
    ),
    "weights shared out, no grid": (
        2,
        UNMOVED_BY_SUMS,
        {
            **UNMOVED,
            "phases": [
                {"where": "model", "tokens": 400, "batch_size": 5},
                {"where": "model", "tokens": 200},
            ],
        },
    ),
    "mixed 2:4, ranks, two steps": (
        2,
        CHOSEN,
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

CLIP = 0.001
"""Far below any gradient, so that its length is compared too."""
FIRST_STEPS: Mapping[str, tuple[int | None, Mapping[str, object], Mapping[str, object]]] = {
    "shared out": (1, {}, {"where": "model", "batch_size": 5}),
    "shared out, on a grid, one process idle": (
        1,
        UNMOVED,
        {**WEIGHTS, "train": ["weights", "scales", "norms"], "batch_size": 2, "rate": "relative"},
    ),
    "whole": (None, {}, {"where": "model", "train": ["weights", "norms"], "batch_size": 5}),
    "norms": (None, UNMOVED, NORMS),
    "adapters": (None, {}, {**ADAPTERS, "batch_size": 5}),
    "blocks": (None, UNMOVED, {**BLOCKS, "batch_size": 5}),
}
"""Memory of each of three processes, changes of the recipe, and the phase."""
ADDED_UP = {"squares": 2e-5, "hessian": 2e-5, "raw": 1e-3, "gradient": 1e-3}
"""What may differ: sums in another order, by 2e-6; gradients of weights that SparseGPT updated, by 4e-5."""


class Warm(Protocol):
    """The fixture of this name."""

    def team(self, count: int, argv: list[str], log: Path, env: dict[str, str]) -> int: ...


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def together(warm: Warm) -> Together:
    """A function that has several processes compress into a folder, and gives their exit code."""

    def run(source: Path, chosen: Recipe, folder: Path, count: int, **environment: str) -> int:
        path, log = folder.with_suffix(".json"), folder.with_suffix(".log")
        path.write_text(chosen.model_dump_json(), "utf-8")
        words = [str(TOGETHER), str(source), str(path), str(folder)]
        code = warm.team(count, words, log, {**os.environ, "OMP_NUM_THREADS": "1", **environment})
        assert code == 0 or "DIES" in environment, log.read_text("utf-8")[-3000:]
        return code

    return run


def chosen_for(name: str) -> Recipe:
    _, changes, phase = FIRST_STEPS[name]
    return load_recipe(overrides={**BASE, **changes, "phases": [{**phase, "clip": CLIP}]}.items())


@pytest.fixture(scope="module")
def first_steps(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what three processes, started once, have together before the first step of each case."""
    folder = tmp_path_factory.mktemp("first_steps")
    cases = [
        {"memory": memory, "recipe": chosen_for(name).model_dump(mode="json")}
        for name, (memory, _, _) in FIRST_STEPS.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    done = torchrun(3, str(FIRST_STEP), str(tiny_llama), str(folder / "cases.json"), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def first_step() -> FirstStep:
    """The function that the processes run."""
    spec = importlib.util.spec_from_file_location("first_step", FIRST_STEP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: FirstStep = module.first_step
    return function


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
    name: str, tiny_llama: Path, tmp_path: Path, stored: Stored, distance: Distance, together: Together
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


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_what_is_added_up_is_what_one_process_has(
    name: str,
    first_step: FirstStep,
    first_steps: Path,
    tiny_llama: Path,
    tmp_path: Path,
    distance: Distance,
) -> None:
    """Input moments, and the gradients of the first step, as they are and as an optimizer gets them."""
    expected = first_step(tiny_llama, chosen_for(name), Room(), tmp_path / "one")
    found = load_file(first_steps / f"{list(FIRST_STEPS).index(name)}.safetensors")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert distance(found[key], value) < ADDED_UP[key.split()[0]], key
    gradients = [value for key, value in expected.items() if key.startswith("gradient")]
    length = float(torch.stack([value.square().sum() for value in gradients]).sum().sqrt())
    assert length == pytest.approx(CLIP, rel=1e-3)


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
    together: Together,
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
