"""`losa-deploy evaluate`: perplexity with its standard error on any text."""

from __future__ import annotations

import argparse
from pathlib import Path

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_threads, positive, thread_count
from losa_deploy.console import Console, table


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="exported, merged or dense model folder, or GGUF file"
    )
    parser.add_argument(
        "--text", default="builtin", metavar="FILE", help="UTF-8 text (default: the shipped one)"
    )
    parser.add_argument("--window", type=positive, default=512, metavar="N", help="tokens per window (512)")
    parser.add_argument("--text-tokens", type=positive, default=4096, metavar="N", help="tokens used (4096)")
    parser.add_argument("--runtime", metavar="NAME", help="see `losa-deploy formats` (default: by folder)")
    add_threads(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.benchmarks.accuracy import perplexity, text_windows
    from losa_deploy.cli.stages import pick_runtime, warn_of_fallback
    from losa_deploy.gate import evaluation_text
    from losa_deploy.text import load_tokenizer

    text = evaluation_text(args.text)
    runtime = pick_runtime(args.path, args.runtime)
    tokenizer = load_tokenizer(args.path)
    session = runtime.open(args.path, threads=thread_count(args))
    warn_of_fallback(runtime, console)
    window = min(args.window, session.context_length or args.window)
    windows = text_windows(tokenizer, text, window, args.text_tokens)
    try:
        found = perplexity(session, windows, window)
    finally:
        session.close()
    document = {
        "schema": "losa.evaluate/1",
        "model": str(args.path),
        "runtime": runtime.name,
        "text": args.text,
        "window": found.window,
        "windows": found.windows,
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "perplexity_stderr": found.stderr,
        "perplexity_stderr_windows": found.stderr_windows,
    }
    if args.json:
        console.result_json(document)
        return
    rows = [
        ("perplexity", f"{found.perplexity:.3f} ± {found.stderr:.3f} (standard error over tokens)"),
        ("text", f"{args.text}: {found.tokens} tokens in {found.windows} windows of {found.window}"),
        ("runtime", runtime.name),
    ]
    console.result(table((), rows))


COMMAND = Command(
    name="evaluate",
    summary="measure perplexity with its standard error",
    examples=(
        "losa-deploy evaluate build/demo",
        "losa-deploy evaluate build/demo.work/merged --text notes.txt --window 256 --json",
    ),
    add_arguments=_add,
    run=_run,
)
