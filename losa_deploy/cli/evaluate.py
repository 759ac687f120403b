"""`losa-deploy evaluate`: perplexity as the literature computes it, distance from dense, zero-shot tasks."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.evaluate_result import Measured, Table, accuracy_cell, text_document, text_lines
from losa_deploy.cli.flags import add_threads, positive, thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.interfaces import Runtime, Session
    from losa_deploy.text.tokenizer import Tokenizer

BUILTIN = "builtin"
WINDOW, TEXT_TOKENS = 2048, 8192
ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
"""Texts in rows, which are joined as the rows of a Hugging Face data set are in the literature."""
JOINT = "\n\n"


def _add(parser: argparse.ArgumentParser) -> None:
    model = "exported, merged or dense model folder, or GGUF file"
    parser.add_argument("path", type=Path, nargs="?", metavar="PATH", help=f"{model} (or --model)")
    parser.add_argument("-m", "--model", type=Path, metavar="PATH", help="the same as PATH")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text, or rows (.jsonl, .jsonl.gz, .parquet) that a blank line joins (default: built in)",
    )
    text.add_argument(
        "--window", type=positive, metavar="N", help="tokens per window (2048, or a shorter context)"
    )
    text.add_argument(
        "--text-tokens", type=positive, metavar="N", help="tokens used, in whole windows, at least one (8192)"
    )
    text.add_argument("--dense", type=Path, metavar="PATH", help="dense model to compare with (KL, same top)")
    tasks = parser.add_argument_group("zero-shot tasks")
    tasks.add_argument("--tasks", metavar="NAMES", help="e.g. piqa,arc_easy (needs lm-eval)")
    tasks.add_argument("--task-rows", type=Path, metavar="DIR", help="folder with <task>/rows.jsonl.gz")
    tasks.add_argument("--limit", type=positive, metavar="N", help="first N rows of every task (all)")
    parser.add_argument("--runtime", metavar="NAME", help="see `losa-deploy formats` (default: by folder)")
    add_threads(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.cli.stages import warn_of_fallback
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.text.tokenizer import load_tokenizer

    path = _model_path(args)
    _check_flags(args)
    text = None if args.tasks and args.text is None else _read_text(args.text or BUILTIN)
    rows = _read_rows(args) if args.tasks else {}
    runtime = pick_runtime(path, args.runtime)
    tokenizer = load_tokenizer(path)
    document: dict[str, object] = {"schema": "losa.evaluate/2", "model": str(path), "runtime": runtime.name}
    lines: Table = []
    with closing(runtime.open(path, threads=thread_count(args))) as session:
        warn_of_fallback(runtime, console)
        if text is not None:
            measured = _measure(args, path, text, tokenizer, session, console)
            document |= text_document(measured)
            lines += text_lines(measured)
        if rows:
            document |= _run_tasks(args, rows, tokenizer, session, console, lines)
    if args.json:
        console.result_json(document)
        return
    console.result(table((), [*lines, ("runtime", runtime.name)]))


def _model_path(args: argparse.Namespace) -> Path:
    if (args.path is None) == (args.model is None):
        raise UsageError(
            "No model was named." if args.path is None else "Two models were named, PATH and --model.",
            hint="Name one: losa-deploy evaluate -m PATH.",
        )
    chosen: Path = args.path or args.model
    return chosen


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing."""
    if args.tasks and args.task_rows is None:
        raise UsageError(
            "--tasks needs the rows of the tasks.", hint="Add --task-rows DIR; see docs/evaluation.md."
        )
    unused = [f for f in ("task_rows", "limit") if getattr(args, f) is not None] if not args.tasks else []
    if unused:
        raise UsageError(f"{_flag(unused[0])} needs tasks.", hint="Add --tasks piqa, for example.")
    if args.tasks and args.text is None:
        unused = [f for f in ("dense", "window", "text_tokens") if getattr(args, f) is not None]
        if unused:
            raise UsageError(f"With --tasks, {_flag(unused[0])} needs a text.", hint="Add --text FILE.")
    if args.window == 1:
        raise UsageError(
            "A window of 1 token predicts nothing, expected at least 2.", hint=f"Try --window {WINDOW}."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_text(name: str) -> str:
    from losa_deploy.text.corpus import read_rows
    from losa_deploy.verify.questions import evaluation_text

    if name.endswith(ROW_FILES):
        return JOINT.join(read_rows(Path(name)))
    return evaluation_text(name)


def _read_rows(args: argparse.Namespace) -> dict[str, list[dict[str, object]]]:
    from losa_deploy.benchmarks.task_rows import task_rows
    from losa_deploy.benchmarks.tasks import require_lm_eval

    names = dict.fromkeys(name.strip() for name in args.tasks.split(","))
    rows = {name: task_rows(args.task_rows, name, args.limit) for name in names}
    require_lm_eval()
    return rows


def _measure(
    args: argparse.Namespace, path: Path, text: str, tokenizer: Tokenizer, session: Session, console: Console
) -> Measured:
    from losa_deploy.benchmarks.literature import literature_windows, score_text

    with _open_dense(args, tokenizer, console) as (dense, runtime):
        opened = [(path, session)] + ([(args.dense, dense)] if dense is not None else [])
        window = _window(args.window, opened, console)
        windows = literature_windows(tokenizer, text, window, args.text_tokens or TEXT_TOKENS)
        if windows.length < window:
            console.warn(
                f"The text has {windows.text_tokens} tokens, fewer than the window of {window}: "
                "it is scored as one short window."
            )
        with console.stage("perplexity") as progress:
            found, distance = score_text(session, windows, dense, progress)
    name = args.text or BUILTIN
    joined = name.endswith(ROW_FILES)
    return Measured(name, joined, windows, found, distance, str(args.dense or ""), runtime)


def _window(wanted: int | None, opened: Sequence[tuple[Path, Session]], console: Console) -> int:
    """`--window`, which has to fit into every context; without it the literature's or what fits."""
    path, shortest = min(
        ((path, session.context_length) for path, session in opened if session.context_length),
        key=lambda pair: pair[1],
        default=(opened[0][0], wanted or WINDOW),
    )
    if wanted is not None and wanted > shortest:
        raise UsageError(
            f"The window has {wanted} tokens, the context of {path} only {shortest}.",
            hint=f"Give --window {shortest} or less.",
        )
    if wanted is None and shortest < WINDOW:
        console.warn(f"The context of {path} is {shortest} tokens: windows are that long, not {WINDOW}.")
    return wanted or min(WINDOW, shortest)


@contextmanager
def _open_dense(
    args: argparse.Namespace, tokenizer: Tokenizer, console: Console
) -> Iterator[tuple[Session | None, str]]:
    """The session of `--dense` and its runtime's name; `UsageError` if it splits text in another way."""
    if args.dense is None:
        yield None, ""
        return
    from losa_deploy.cli.stages import warn_of_fallback
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.text.tokenizer import load_tokenizer
    from losa_deploy.verify.questions import evaluation_text

    runtime: Runtime = pick_runtime(args.dense, None)
    sample = evaluation_text(BUILTIN)[:2000]
    if load_tokenizer(args.dense).encode(sample, special=False) != tokenizer.encode(sample, special=False):
        raise UsageError(
            f"The tokenizer of {args.dense} splits text in another way than that of the model.",
            hint="Give --dense the model that this one was made from.",
        )
    with closing(runtime.open(args.dense, threads=thread_count(args))) as session:
        warn_of_fallback(runtime, console)
        yield session, runtime.name


def _run_tasks(
    args: argparse.Namespace,
    rows: dict[str, list[dict[str, object]]],
    tokenizer: Tokenizer,
    session: Session,
    console: Console,
    lines: Table,
) -> dict[str, object]:
    from losa_deploy.benchmarks.tasks import LM_EVAL, mean_of_tasks, run_tasks

    # lm-eval draws bars of its own and warns of what is meant to be.
    hidden = nullcontext() if console.verbose else redirect_stderr(io.StringIO())
    with console.stage("tasks") as progress, hidden:
        results, truncated = run_tasks(session, tokenizer, rows, progress)
    if truncated:
        console.warn(
            f"{truncated} requests lost the beginning of their text: the model's context is shorter."
        )
    means = {"mean": mean_of_tasks(results), "mean without boolq": mean_of_tasks(results, without="boolq")}
    lines += [(r.name, accuracy_cell(r)) for r in results]
    lines += [(name, accuracy_cell(mean)) for name, mean in means.items() if mean is not None]
    document: dict[str, object] = {"lm_eval": LM_EVAL, "task_rows": str(args.task_rows)}
    document |= {"tasks": {r.name: r.to_json() for r in results}, "truncated_requests": truncated}
    named = {f"tasks_{name.replace(' ', '_')}": mean for name, mean in means.items()}
    return document | {name: mean.to_json() for name, mean in named.items() if mean is not None}


COMMAND = Command(
    name="evaluate",
    summary="measure perplexity, distance from dense, zero-shot accuracy",
    examples=(
        "losa-deploy evaluate -m build/demo --text notes.txt --dense build/demo.work/source --json",
        "losa-deploy evaluate -m build/demo --tasks piqa,arc_easy --task-rows rows --limit 100",
    ),
    add_arguments=_add,
    run=_run,
)
