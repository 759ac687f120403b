"""`losa-deploy doctor`: what this machine offers, and what would stop a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from losa_deploy import __version__
from losa_deploy.cli.command import Command
from losa_deploy.console import Console, table
from losa_deploy.output import free_bytes


def _run(args: argparse.Namespace, console: Console) -> None:
    facts = collect()
    if args.json:
        console.result_json(facts)
    else:
        console.result(table((), [(key, _shown(value)) for key, value in facts.items() if key != "schema"]))


def collect() -> dict[str, object]:
    """The `losa.doctor/1` document."""
    import psutil

    from losa_deploy.benchmarks.environment import collect as collect_environment

    machine = collect_environment()
    return {
        "schema": "losa.doctor/1",
        "losa_deploy": __version__,
        "python": machine.python,
        "os": machine.os,
        "cpu": machine.cpu,
        "cpu_features": list(machine.flags),
        "cores": machine.cores,
        "logical_cores": machine.logical_cores,
        "native_library": _native(),
        **_kernels(),
        **_runtimes(),
        "memory_bytes": machine.ram_bytes,
        "memory_available_bytes": psutil.virtual_memory().available,
        "disk_free_bytes": free_bytes(Path.cwd()),
        "hub_cache": hub_cache(),
        "hub_offline": bool(os.environ.get("HF_HUB_OFFLINE")),
        "default_model": _default_model(),
        "versions": machine.versions,
    }


def hub_cache() -> str:
    """Where Hugging Face keeps downloads, by its own environment variables."""
    home = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    return os.environ.get("HF_HUB_CACHE", str(Path(home) / "hub"))


def _native() -> str:
    try:
        from losa_deploy._native import kernels_version
    except ImportError as error:
        return f"not usable: {error}"
    return f"version {kernels_version()}"


def _kernels() -> dict[str, object]:
    """Which kernels run here and why, and which could."""
    try:
        from losa_deploy import _native
    except ImportError:
        return {"kernel_target": "none", "kernel_reason": "", "kernel_targets": []}
    return {
        "kernel_target": _native.target_name(),
        "kernel_reason": _native.target_reason(),
        "kernel_targets": _native.targets(),
    }


def _runtimes() -> dict[str, str]:
    """What each runtime says about this machine."""
    from losa_deploy import plugins

    return {key: value for runtime in plugins.usable_runtimes() for key, value in runtime.facts().items()}


def _default_model() -> str:
    from losa_deploy.errors import MissingError
    from losa_deploy.sources.locate import default_model

    try:
        return default_model().name
    except MissingError as error:
        return f"not installed. {error.hint}"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > 10**6:
        return f"{value / 1e9:.1f} GB"
    return str(value)


COMMAND = Command(
    name="doctor",
    summary="show CPU features, kernel target, versions, cache, free disk and memory",
    examples=("losa-deploy doctor", "losa-deploy doctor --json"),
    add_arguments=lambda parser: None,
    run=_run,
)
