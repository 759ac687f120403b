"""`losa-deploy merge`: adapted model → ordinary Hugging Face folder with exact zeros, and the proof."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_model, add_output, add_threads, thread_count
from losa_deploy.cli.options import MERGE, add_recipe_options, printed_recipe, revise_recipe
from losa_deploy.console import Console


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="folder written by compress")
    add_model(parser)
    add_output(parser, "<PATH>-merged")
    add_threads(parser)
    add_recipe_options(parser, MERGE)


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.cli import stages
    from losa_deploy.compress.adapted import AdaptedModel
    from losa_deploy.output import check_output, sibling

    adapted = AdaptedModel.open(args.path)
    recipe = revise_recipe(adapted.state.recipe, args)
    if printed_recipe(args, recipe, console):
        return
    output = args.output or sibling(args.path.absolute(), "-merged")
    check_output(output, overwrite=args.overwrite)
    work = stages.enclosing_work_folder(args.path)
    console.info(f"Output: {output}")
    with console.captured(work / "export.log"):
        stages.set_threads(thread_count(args))
        source, record = stages.open_source(args, work, console)
        adapted = dataclasses.replace(adapted, state=adapted.state.model_copy(update={"recipe": recipe}))
        model = stages.run_merge(source, record, adapted, output, console, overwrite=args.overwrite)
    proof = model.manifest.merge_proof
    if args.json:
        shown = proof.model_dump(mode="json") if proof else None
        console.result_json({"schema": "losa.merge/1", "folder": str(output), "merge_proof": shown})
        return
    if proof:
        console.info(
            f"Merge proof: support equal {proof.support_equal}, largest logit difference "
            f"{proof.max_abs_logit_difference:.2e} (allowed {proof.logit_tolerance:.2e}), "
            f"cast error {proof.cast_error:.2e}"
        )
    console.result(str(output))


COMMAND = Command(
    name="merge",
    summary="merge the masked adapters without losing a zero or a bit, and prove it",
    examples=(
        "losa-deploy merge build/adapted --output build/merged",
        "losa-deploy merge build/adapted --model path/to/model --dtype f16 --json",
    ),
    add_arguments=_add,
    run=_run,
)
