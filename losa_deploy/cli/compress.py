"""`losa-deploy compress`: dense model → masks and adapted weights, resumable."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy import launcher
from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_device, add_memory, add_model, add_output, add_threads, thread_count
from losa_deploy.cli.machine import add_machine, recipe_for_machine
from losa_deploy.cli.options import COMPRESS, MERGE, add_recipe_options, printed_recipe
from losa_deploy.console import Console
from losa_deploy.errors import UsageError
from losa_deploy.pipeline import check_state_folder, work_folder

if TYPE_CHECKING:
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.recipe import Recipe


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_output(parser, "./<name>-losa-<sparsity>-adapted")
    parser.add_argument("--dry-run", action="store_true", help="print memory, disk and time, and stop")
    add_threads(parser)
    add_device(parser)
    add_memory(parser)
    add_machine(parser)
    add_recipe_options(parser, (*COMPRESS, *MERGE))


def _run(args: argparse.Namespace, console: Console) -> None:
    recipe = recipe_for_machine(args, console)
    if printed_recipe(args, recipe, console):
        return
    from losa_deploy.cli import all_stages, expect, stages
    from losa_deploy.compress.team import joined

    output = args.output or stages.default_output(args.model, recipe, "adapted")
    check_state_folder(output)
    room = expect.room(args)
    work = work_folder(output)
    if args.dry_run:
        found = expect.expected(args, *all_stages.source_shapes(args), recipe)
        expect.show(found, output, expect.budget(args), console, as_json=args.json)
        return
    console.info(f"Output: {output}")
    log = f"export-{launcher.rank()}.log" if launcher.rank() else "export.log"
    with console.captured(work / log), joined(room.device) as team:
        room = replace(room, team=team)
        stages.set_threads(thread_count(args))
        source, record = team.after_the_first(lambda: stages.open_source(args, work, console))
        complete = team.after_the_first(lambda: _complete(args, output, record, recipe))
        if not complete:
            found = expect.expected(args, *all_stages.checkpoint_shapes(source), recipe)
            console.info(expect.line(found))
            expect.require(found, output, room.bytes)
        adapted = stages.run_compress(source, record, recipe, output, console, room=room)
    if args.json:
        console.result_json(
            {
                "schema": "losa.compress/1",
                "folder": str(output),
                "fingerprint": adapted.state.fingerprint,
                "steps": adapted.state.step,
                "block_sparsity": list(adapted.state.block_sparsity),
                "block_rank": list(adapted.state.block_rank),
                "block_error": list(adapted.state.block_error),
            }
        )
    else:
        console.result(str(output))


def _complete(args: argparse.Namespace, output: Path, record: SourceRecord, recipe: Recipe) -> bool:
    """Whether `output` holds all of this run; `UsageError` if it is of another one."""
    from losa_deploy.compress.adapted import STATE_FILE, fingerprint, read_state
    from losa_deploy.output import remove

    if args.overwrite and launcher.rank() == 0 and (output / STATE_FILE).is_file():
        remove(output)
    state = read_state(output) if output.is_dir() else None
    if state is not None and state.fingerprint != fingerprint(record.files, recipe):
        raise UsageError(
            f"{output} was made from another source, recipe, text or seed.",
            hint="Add --overwrite to start afresh, or choose another --output.",
        )
    return state is not None and state.complete


COMMAND = Command(
    name="compress",
    summary="make a model sparse: masks and adapted weights, saved after every step",
    examples=(
        "losa-deploy compress --sparsity 0.6 --output build/adapted",
        "losa-deploy compress --model path/to/model --memory 8G --dry-run",
    ),
    add_arguments=_add,
    run=_run,
    resumable=True,
    together=True,
)
