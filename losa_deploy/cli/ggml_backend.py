"""`losa-deploy ggml-backend`: where the sparse backend for llama.cpp is, and how programs load it."""

from __future__ import annotations

import argparse

from losa_deploy.cli.command import Command
from losa_deploy.console import Console, table


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", action="store_true", help="print the path of the plug-in, nothing else")


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.bindings.ggml import ROUTES, TESTED, plugin_path

    path = plugin_path()
    if args.json:
        document = {
            "schema": "losa.ggml-backend/1",
            "path": str(path),
            "tested_versions": list(TESTED),
            "routes": list(ROUTES),
        }
        console.result_json(document)
    elif args.path:
        console.result(str(path))
    else:
        rows = [
            ("plug-in", str(path)),
            ("tested with ggml", ", ".join(TESTED)),
            ("Python", "losa_deploy.bindings.ggml.load_plugin().start(), before the first model"),
            ("programs", f"GGML_BACKEND_PATH={path} llama-server -m MODEL.gguf"),
            ("LOSA_GGML", "a (in the CPU backend), b (a device of its own) or off; unset: a, else b"),
            ("LOSA_GGML_VERBOSE", "1: programs say on stderr which route they take and what they packed"),
        ]
        console.result(table((), rows))


COMMAND = Command(
    name="ggml-backend",
    summary="show the sparse backend that llama.cpp programs load",
    examples=("losa-deploy ggml-backend", "losa-deploy ggml-backend --path"),
    add_arguments=_add_arguments,
    run=_run,
)
