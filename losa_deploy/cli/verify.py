"""`losa-deploy verify`: is a folder what it claims, and does the artifact compute the merged model?"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_threads, thread_count
from losa_deploy.cli.options import add_recipe_options, printed_recipe, revise_recipe
from losa_deploy.console import Console, table
from losa_deploy.errors import GateError, InputError, UsageError
from losa_deploy.pipeline import pick_runtime, work_folder

if TYPE_CHECKING:
    from losa_deploy.manifest import Manifest
    from losa_deploy.recipe import Recipe


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="folder written by merge or export")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="merged folder of an export (default: <PATH>.work/merged)"
    )
    parser.add_argument("--runtime", metavar="NAME", help="runtime to check in (default: the format's own)")
    add_threads(parser)
    add_recipe_options(parser, ("verify",))


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.manifest import Manifest

    manifest = Manifest.read(args.path)
    recipe = revise_recipe(manifest.recipe, args)
    if printed_recipe(args, recipe, console):
        return
    if recipe.verify.level == "off":
        raise UsageError("Level `off` checks nothing.", hint="Use --verify quick or --verify full.")
    if manifest.kind == "merged":
        facts, reasons = _merged(args)
    else:
        facts, reasons = _exported(args, manifest, recipe, console)
    if args.json:
        console.result_json({"schema": "losa.verify/1", "folder": str(args.path), **facts})
    else:
        console.result(table((), [(key.replace("_", " "), _shown(value)) for key, value in facts.items()]))
    if reasons:
        raise GateError(
            f"{args.path} failed {len(reasons)} checks; the first: {reasons[0]}.",
            hint="Export it again, or copy it again if it was moved.",
            details={"failed_checks": len(reasons)},
        )


def _merged(args: argparse.Namespace) -> tuple[dict[str, object], tuple[str, ...]]:
    from losa_deploy.model import SparseModel
    from losa_deploy.plugins import weight_suffixes
    from losa_deploy.verify.check import verify_merged

    check = verify_merged(SparseModel.open(args.path), weight_suffixes())
    return dataclasses.asdict(check), check.reasons


def _exported(
    args: argparse.Namespace, manifest: Manifest, recipe: Recipe, console: Console
) -> tuple[dict[str, object], tuple[str, ...]]:
    from losa_deploy import plugins
    from losa_deploy.cli import stages
    from losa_deploy.model import SparseModel

    merged = args.against or work_folder(args.path) / "merged"
    if not merged.is_dir():
        raise InputError(
            f"There is no merged model at {merged} to compare with.",
            hint="Name the merged folder the export was made from with --against.",
        )
    model = SparseModel.open(merged)
    exporter = plugins.load_exporter(manifest.format)
    runtime = pick_runtime(args.path, args.runtime)
    parity = stages.run_verify(args.path, model, exporter, runtime, recipe, thread_count(args), console)
    return dataclasses.asdict(parity), parity.reasons


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


COMMAND = Command(
    name="verify",
    summary="check hashes, structure, zeros and parity with the merged model",
    examples=("losa-deploy verify build/demo", "losa-deploy verify build/demo.work/merged --json"),
    add_arguments=_add,
    run=_run,
)
