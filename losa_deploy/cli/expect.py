"""What a compression is expected to take: said before it starts, and refused if it cannot fit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy import launcher
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import ResourceError
from losa_deploy.output import free_bytes, require_disk

if TYPE_CHECKING:
    from losa_deploy.compress.device import Room
    from losa_deploy.compress.estimate import Estimate
    from losa_deploy.recipe import Recipe

Shapes = Mapping[str, tuple[int, int]]
SCHEMA = "losa.compress-plan/1"
ROOM = 0.05
"""How much an estimate may be above the memory that is there: it is an estimate."""


def expected(args: argparse.Namespace, linears: Shapes, others: Shapes, recipe: Recipe) -> Estimate:
    """Memory, disk and time; measures this machine for two seconds."""
    from losa_deploy.cli.stages import set_threads
    from losa_deploy.compress.estimate import Geometry, estimate
    from losa_deploy.compress.optimizer import settled
    from losa_deploy.compress.precision import uses_bf16
    from losa_deploy.compress.rates import measured_rates

    set_threads(thread_count(args))
    device = room(args).device
    bf16 = uses_bf16(recipe.precision, device)
    shape, processes = Geometry.of(linears, others), launcher.size()
    rates = measured_rates(shape.hidden, shape.inner, bf16=bf16, device=device)
    recipe = settled(recipe, device)
    return estimate(shape, recipe, budget(args), rates, bf16=bf16, processes=processes)


def budget(args: argparse.Namespace) -> int:
    """Bytes of the device's memory that the run may take: `--memory`, or what is free."""
    return room(args).bytes


def room(args: argparse.Namespace) -> Room:
    """`--device` and `--memory`; `UsageError` if there is no such device."""
    from losa_deploy.compress.device import Room, find_device

    return Room(find_device(args.device), args.memory)


def line(found: Estimate) -> str:
    """An estimate in one line."""
    each = " for each process" if launcher.size() > 1 else ""
    return (
        f"Expected: peak memory {found.peak_ram_bytes / 1e9:.1f} GB{each}, "
        f"{found.disk_bytes / 1e9:.1f} GB of disk, about {_duration(found.seconds)}"
    )


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def require(found: Estimate, output: Path, memory: int) -> None:
    """Raise `ResourceError` if the run does not fit into memory or on the disk of `output`."""
    require_disk(output, found.disk_bytes, "The compression state")
    if found.peak_ram_bytes > memory * (1 + ROOM):
        stage = max(found.stages, key=found.stages.__getitem__)
        raise ResourceError(
            f"This needs about {found.peak_ram_bytes / 1e9:.1f} GB of memory ({stage}), "
            f"{memory / 1e9:.1f} GB may be taken.",
            hint="Use fewer --samples or a shorter --sequence-length, a preset without phases that train "
            "weights through the whole model, or a machine with more memory (see --memory).",
            details={"needed_bytes": found.peak_ram_bytes, "available_bytes": memory},
        )


def document(found: Estimate) -> dict[str, object]:
    """An estimate for JSON."""
    return {
        "peak_ram_bytes": found.peak_ram_bytes,
        "disk_bytes": found.disk_bytes,
        "seconds": round(found.seconds, 1),
        "stages": dict(found.stages),
    }


def show(found: Estimate, output: Path, memory: int, console: Console, *, as_json: bool) -> None:
    """The result of a dry run; raises `ResourceError` if the run does not fit."""
    if as_json:
        console.result_json(
            {
                "schema": SCHEMA,
                "output": str(output),
                **document(found),
                "memory_bytes": memory,
                "disk_free_bytes": free_bytes(output),
            }
        )
    else:
        console.result(line(found))
        rows = [(name, f"{size / 1e9:.2f} GB") for name, size in found.stages.items()]
        console.result(table(("stage", "memory"), rows))
    require(found, output, memory)
