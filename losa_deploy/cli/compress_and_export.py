"""`losa-deploy compress-and-export`: the whole path in one command."""

from __future__ import annotations

import argparse

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_device, add_format, add_memory, add_model, add_output, add_threads
from losa_deploy.cli.machine import add_machine, recipe_for_machine
from losa_deploy.cli.options import (
    COMPRESS,
    EXPORT,
    MERGE,
    add_recipe_options,
    printed_recipe,
)
from losa_deploy.console import Console


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_format(parser)
    add_output(parser, "./<name>-losa-<sparsity>-<format>")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written and stop")
    parser.add_argument(
        "--keep-work",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep <output>.work (resume state, merged model, dense baseline) at success",
    )
    add_threads(parser)
    add_device(parser)
    add_memory(parser)
    add_machine(parser)
    add_recipe_options(parser, (*COMPRESS, *MERGE, *EXPORT))


def _run(args: argparse.Namespace, console: Console) -> None:
    recipe = recipe_for_machine(args, console)
    if printed_recipe(args, recipe, console):
        return
    from losa_deploy.cli import all_stages

    all_stages.compress_and_export(args, recipe, console)


COMMAND = Command(
    name="compress-and-export",
    summary="the whole path: compress, merge, export, verify, measure, report",
    examples=(
        "losa-deploy compress-and-export --format onnx",
        "losa-deploy compress-and-export --format onnx --model path/to/model --sparsity 0.6 --dry-run",
    ),
    add_arguments=_add,
    run=_run,
    resumable=True,
)
