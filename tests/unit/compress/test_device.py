"""Compression on another device than the CPU, which here is one whose numbers lie in the CPU's memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from losa_deploy.compress import sample
from losa_deploy.compress.device import find_device
from losa_deploy.compress.schedule import compress
from losa_deploy.errors import UsageError
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

Stored = Callable[[Path], dict[str, torch.Tensor]]
Distance = Callable[[torch.Tensor, torch.Tensor], float]
FAR = Path(__file__).with_name("far.py")
BASE = {"calibration.samples": 12, "calibration.sequence_length": 24, "precision": "f32"}
BLOCKS = {"train": ["weights", "scales"], "grid": "export", "tokens": 300, "window": 2}
NORMS = {"train": ["norms"], "where": "model", "grid": "export", "tokens": 400}
WEIGHTS = {
    "train": ["weights", "scales"],
    "where": "model",
    "grid": "export",
    "tokens": 400,
    "loss": {"kl": 1.0, "ce": 0.2},
}
ADAPTERS = {"train": ["adapters"], "where": "model", "tokens": 400, "dropout": 0.1}
RECIPES: Mapping[str, Mapping[str, object]] = {
    "quick": {"phases": [BLOCKS, NORMS]},
    "sliding": {"sparsity.pattern": "sliding", "phases": [WEIGHTS]},
    "mixed 2:4, ranks, two steps": {
        "sparsity.pattern": "2:4",
        "prune.method": "wanda",
        "allocation.method": "rmi",
        "allocation.samples": 8,
        "schedule.steps": 2,
        "phases": [ADAPTERS],
    },
    "pair": {"sparsity.pattern": "pair", "phases": []},
}


def on_far(source: Path, chosen: Recipe, folder: Path) -> None:
    path = folder.with_suffix(".json")
    path.write_text(chosen.model_dump_json(), "utf-8")
    command = [sys.executable, str(FAR), str(source), str(path), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no backends in Python",
)
@pytest.mark.parametrize(
    "name", [name if name == "quick" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_another_device_gives_what_the_cpu_gives(
    name: str,
    tiny_llama: Path,
    tmp_path: Path,
    stored: Stored,
    distance: Distance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A CPU would write another text than a device: its weights have eight bits.
    monkeypatch.setattr(sample, "is_packed", lambda device, dtype: False)
    chosen = load_recipe(overrides={**BASE, **RECIPES[name]}.items())
    on_far(tiny_llama, chosen, tmp_path / "far")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = Checkpoint.open(tiny_llama)
        compress(source, SourceRecord(id="someone/tiny"), chosen, tmp_path / "cpu", progress=no_progress)
    finally:
        torch.set_num_threads(threads)
    expected, found = stored(tmp_path / "cpu"), stored(tmp_path / "far")
    assert found.keys() == expected.keys() and len(found) > 20
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert distance(found[key], value) < 0.02, key


def test_a_device_that_is_not_there_is_refused() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(
        UsageError, match=f"no device {missing}: torch .* finds {missing[5:]} of the kind cuda"
    ):
        find_device(missing)
    for name in ("gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(UsageError, match="There is no device"):
            find_device(name)
