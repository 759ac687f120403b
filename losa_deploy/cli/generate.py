"""`losa-deploy generate`: one continuation of one prompt, streamed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.drafts import add_speculate, check_speculate, open_session
from losa_deploy.cli.flags import add_threads, positive
from losa_deploy.console import Console
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.runtimes.generate import GenerateOptions


def add_model_folder(parser: argparse.ArgumentParser) -> None:
    """The model to talk to."""
    parser.add_argument(
        "-m",
        "--model",
        type=Path,
        required=True,
        metavar="MODEL",
        help="exported or merged folder, or GGUF file",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags of `generate` and `chat`."""
    parser.add_argument("--runtime", metavar="NAME", help="see `losa-deploy formats` (default: by folder)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--max-tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 = most likely token (default)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among N tokens; 0 = all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample within probability X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    add_speculate(parser)
    add_threads(parser)


def sampling(args: argparse.Namespace, stop_ids: tuple[int, ...] = ()) -> GenerateOptions:
    """The options those flags stand for; `UsageError` for values out of range."""
    from losa_deploy.runtimes.generate import GenerateOptions

    return GenerateOptions(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=stop_ids,
    )


def _add(parser: argparse.ArgumentParser) -> None:
    add_model_folder(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue (default: stdin)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    add_sampling(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    if args.system and not args.chat:
        raise UsageError("--system needs a conversation.", hint="Add --chat.")
    sampling(args)
    check_speculate(args)
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.runtimes.generate import TokenClock, generate, text_of
    from losa_deploy.runtimes.speculation import Counts
    from losa_deploy.text.tokenizer import load_tokenizer

    text = args.prompt if args.prompt is not None else _standard_input()
    runtime = pick_runtime(args.model, args.runtime)
    tokenizer = load_tokenizer(args.model)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompt = tokenizer.chat([*system, {"role": "user", "content": text}])
    else:
        prompt = tokenizer.encode(text)
    options = sampling(args, tokenizer.eos_ids)
    counts, clock = Counts(), TokenClock()
    session = open_session(args, runtime, tokenizer, counts, console)
    start = time.perf_counter()
    pieces: list[str] = []
    try:
        tokens = clock.watch(generate(session, prompt, options))
        for piece in text_of(tokens, tokenizer, args.stop):
            pieces.append(piece)
            if not args.json:
                console.stream(piece)
    finally:
        session.close()
    seconds = time.perf_counter() - start
    if not args.json:
        console.stream("\n")
        console.detail(f"{runtime.name}: {len(prompt)} prompt tokens, {seconds:.2f} s")
        return
    console.result_json(
        {
            "schema": "losa.generate/1",
            "runtime": runtime.name,
            "prompt_tokens": len(prompt),
            "text": "".join(pieces),
            "generated_tokens": clock.tokens,
            "drafted_tokens": counts.drafted,
            "accepted_tokens": counts.accepted,
            "tokens_per_second": clock.per_second,
            "total_seconds": seconds,
        }
    )


def _standard_input() -> str:
    import sys

    if sys.stdin.isatty():
        raise UsageError(
            "There is no prompt.", hint='Example: losa-deploy generate -m build/demo "Once upon a time"'
        )
    return sys.stdin.read()


COMMAND = Command(
    name="generate",
    summary="continue a prompt, streamed",
    examples=(
        'losa-deploy generate -m build/demo "The capital of France is" --max-tokens 20',
        'losa-deploy generate -m build/demo "Name three colours." --chat --temperature 0.7 --seed 1',
    ),
    add_arguments=_add,
    run=_run,
)
