"""`losa-deploy formats`: what is installed."""

from __future__ import annotations

import argparse

from losa_deploy import plugins
from losa_deploy.cli.command import Command
from losa_deploy.console import Console, table
from losa_deploy.errors import MissingError
from losa_deploy.families import all_families


def _run(args: argparse.Namespace, console: Console) -> None:
    document: dict[str, object] = {
        "schema": "losa.formats/1",
        "exporters": [_plugin(name, "exporter") for name in plugins.exporters()],
        "runtimes": [_plugin(name, "runtime") for name in plugins.runtimes()],
        "families": [{"name": f.name, "model_types": list(f.model_types)} for f in all_families()],
    }
    if args.json:
        console.result_json(document)
        return
    rows = [("exporter", name, _plugin(name, "exporter")["state"]) for name in plugins.exporters()]
    rows += [("runtime", name, _plugin(name, "runtime")["state"]) for name in plugins.runtimes()]
    rows += [("family", f.name, f"model_type {', '.join(f.model_types)}") for f in all_families()]
    console.result(table(("kind", "name", "state"), rows))


def _plugin(name: str, kind: str) -> dict[str, str]:
    try:
        if kind == "exporter":
            plugins.load_exporter(name)
        else:
            plugins.load_runtime(name)
    except MissingError as error:
        return {"name": name, "state": error.message}
    return {"name": name, "state": "ready"}


COMMAND = Command(
    name="formats",
    summary="list the installed exporters, runtimes and model families",
    examples=("losa-deploy formats", "losa-deploy formats --json"),
    add_arguments=lambda parser: None,
    run=_run,
)
