"""Where compression computes: the CPU, or a device whose memory then holds what is open."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losa_deploy.compress.memory import available_bytes
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.errors import UsageError
from losa_deploy.launcher import local_rank, neighbours

CPU = torch.device("cpu")
NARROW = ("mps",)
"""Devices without f64."""


def find_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda`, `cuda:<n>` or `mps`; `UsageError` if it is not there.

    `auto` is the first GPU that torch can use, else the CPU. Of several processes on a machine each has its
    own GPU.
    """
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if present[kind]), "cpu")
    if name == "cuda" and local_rank():
        name = f"cuda:{local_rank()}"
    kind, _, number = name.partition(":")
    if kind not in present or (number and not number.isdecimal()):
        raise UsageError(
            f"There is no device {name!r}.", hint="Use auto, cpu, cuda, cuda:0, cuda:1, … or mps."
        )
    if int(number or 0) >= present[kind]:
        raise UsageError(
            f"There is no device {name}: torch {torch.__version__} finds {present[kind]} of the kind {kind}.",
            hint="Use --device cpu, or install a build of torch for this device.",
        )
    return torch.device(name)


@dataclass(frozen=True)
class Room:
    """A device and how many bytes of it may be taken."""

    device: torch.device = CPU
    memory: int | None = None
    """None: what is free."""
    team: Team = ALONE
    """The processes that compress together, each with a room of its own."""

    @property
    def bytes(self) -> int:
        if self.memory:
            return self.memory
        free = available_bytes(self.device)
        return free if self.device.type == "cuda" else free // neighbours()


HERE = Room()
"""The CPU, and what is free."""


def wide(tensor: Tensor) -> Tensor:
    """In f64 for sums, or in f32 where the device knows nothing wider."""
    return tensor.to(wide_type(tensor.device))


def wide_type(device: torch.device) -> torch.dtype:
    """f64 where the device has it."""
    return torch.float32 if device.type in NARROW else torch.float64


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that time can be taken."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
