"""Which AdamW a phase trains with on a device, what it lacks there, and that its state resumes."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from losa_deploy.compress.device import CPU
from losa_deploy.compress.memory import MOVING_BYTES, moving_bytes
from losa_deploy.compress.optimizer import (
    PACKAGE,
    Kind,
    moments,
    new_optimizer,
    optimizer_on,
    restore_moments,
    saved_kind,
    settled,
)
from losa_deploy.compress.schedule import compress
from losa_deploy.errors import UsageError
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

CUDA = torch.device("cuda")
ON_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec(PACKAGE) is None, reason="needs a CUDA device and bitsandbytes"
)


def test_the_cpu_trains_with_plain_adamw() -> None:
    assert optimizer_on("auto", CPU) == optimizer_on("adamw", CPU) == "adamw"
    recipe = settled(load_recipe(preset="standard"), CPU)
    assert [phase.optimizer for phase in recipe.phases] == ["auto", "adamw"], "blocks have no choice"
    assert PACKAGE not in sys.modules


def test_what_eight_bits_lack_is_said_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a CUDA device; this run is on cpu"):
        phase = {"train": ["weights"], "where": "model", "optimizer": "adamw8bit"}
        recipe = load_recipe(overrides=[("phases", [phase])])
        compress(
            Checkpoint.open(tiny_llama), SourceRecord(id="tiny"), recipe, tmp_path / "a", progress=no_progress
        )
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="adamw8bit saves memory in phases through the model"):
        load_recipe(overrides=[("phases", [{"optimizer": "adamw8bit"}])])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from losa_deploy.compress import optimizer as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert optimizer_on("auto", CUDA) == "adamw"
    with pytest.raises(UsageError, match="package bitsandbytes, which is not installed") as error:
        optimizer_on("adamw8bit", CUDA)
    assert "losa-deploy[cuda]" in str(error.value.hint)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert optimizer_on("auto", CUDA) == optimizer_on("adamw8bit", CUDA) == "adamw8bit"
    assert optimizer_on("adamw", CUDA) == "adamw"


def test_moments_in_eight_bits_take_six_bytes_less() -> None:
    assert moving_bytes("adamw") == moving_bytes("auto") == MOVING_BYTES == moving_bytes("adamw8bit") + 6


def steps(kind: Kind, device: torch.device, cut: int) -> list[torch.Tensor]:
    """Two parameters after five steps; saved, and put into a new optimizer, after `cut`."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((96, 64), (64,))  # the second is too small for moments in eight bits
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in shapes]
    gradients = [[torch.randn(shape, generator=draw).to(device) for shape in shapes] for _ in range(5)]

    def fresh() -> torch.optim.Optimizer:
        groups: list[dict[str, object]] = [{"params": [p], "lr": 0.01, "base": 0.01} for p in parameters]
        return new_optimizer(kind, groups, 0.1)

    optimizer = fresh()
    for number, step in enumerate(gradients):
        if number == cut:
            saved = {key: value.clone() for key, value in moments(optimizer, parameters).items()}
            assert saved_kind(saved) == kind and len(saved) >= 4
            optimizer = fresh()
            restore_moments(optimizer, parameters, saved, number)
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters]


@pytest.mark.parametrize(
    ("kind", "device"), [("adamw", CPU), pytest.param("adamw8bit", CUDA, marks=ON_CUDA)], ids=str
)
def test_saved_moments_go_on_where_they_were(kind: Kind, device: torch.device) -> None:
    whole, cut = steps(kind, device, -1), steps(kind, device, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


@ON_CUDA
def test_eight_bits_train_nearly_as_thirty_two_do() -> None:
    exact, near = steps("adamw", CUDA, -1), steps("adamw8bit", CUDA, -1)
    for one, other in zip(exact, near, strict=True):
        assert float((one - other).norm() / one.norm()) < 0.01
