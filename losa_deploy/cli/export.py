"""`losa-deploy export`: merged model → one artifact folder, verified and measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_format, add_output, add_threads, thread_count
from losa_deploy.cli.options import EXPORT, add_recipe_options, printed_recipe, revise_recipe
from losa_deploy.console import Console


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="folder written by merge")
    add_format(parser)
    add_output(parser, "<PATH>-<format>")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written and stop")
    add_threads(parser)
    add_recipe_options(parser, EXPORT)


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy import plugins
    from losa_deploy.cli import finish, plan
    from losa_deploy.cli.stages import require_runtime
    from losa_deploy.model import SparseModel
    from losa_deploy.output import check_output, sibling
    from losa_deploy.pipeline import require_intact, work_folder

    exporter = plugins.load_exporter(args.format)
    model = SparseModel.open(args.path)
    recipe = revise_recipe(model.manifest.recipe, args)
    if printed_recipe(args, recipe, console):
        return
    output = args.output or sibling(args.path.absolute(), f"-{args.format}")
    planned = exporter.plan(model, recipe.export)
    if args.dry_run:
        plan.show(planned, output, console, as_json=args.json)
        return
    check_output(output, overwrite=args.overwrite)
    require_intact(model)
    require_runtime(exporter, recipe.export)
    plan.require_resources(planned, output)
    console.info(plan.line(planned, output))
    work = work_folder(output)
    with console.captured(work / finish.LOG):
        threads = thread_count(args)
        job = finish.Job(exporter, model, planned, recipe, output, work, threads, args.overwrite)
        report = finish.export_and_measure(job, console)
    finish.show(report, output, console, as_json=args.json)


COMMAND = Command(
    name="export",
    summary="write a merged model as an artifact, check it in its runtime, and report",
    examples=(
        "losa-deploy export build/demo.work/merged --format onnx --output build/onnx",
        "losa-deploy export build/demo.work/merged --format onnx --layout dense --value-type f32 --dry-run",
    ),
    add_arguments=_add,
    run=_run,
)
