"""`losa-deploy serve`: an OpenAI-compatible HTTP server; the log on stderr."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.drafts import add_speculate, check_speculate, open_drafts, require_rewinding
from losa_deploy.cli.flags import add_threads, positive, thread_count
from losa_deploy.cli.generate import add_model_folder
from losa_deploy.console import Console
from losa_deploy.errors import MissingError, UsageError

if TYPE_CHECKING:
    from losa_deploy.interfaces import Runtime
    from losa_deploy.runtimes.server.engine import Engine
    from losa_deploy.text.tokenizer import Tokenizer

KEY_VARIABLE = "LOSA_API_KEY"
HOST, PORT, PARALLEL, QUEUE = "127.0.0.1", 8080, 4, 32


def _add(parser: argparse.ArgumentParser) -> None:
    add_model_folder(parser)
    parser.add_argument("--runtime", metavar="NAME", help="see `losa-deploy formats` (default: by folder)")
    parser.add_argument("--model-name", metavar="NAME", help="what clients call it (default: its file name)")
    parser.add_argument("--host", default=HOST, metavar="ADDRESS", help=f"address to listen on ({HOST})")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port; 0 = any free ({PORT})")
    parser.add_argument(
        "--parallel", type=positive, metavar="N", help=f"requests at once (llama.cpp: {PARALLEL}, others: 1)"
    )
    parser.add_argument("--queue", type=int, default=QUEUE, metavar="N", help=f"requests that wait ({QUEUE})")
    parser.add_argument(
        "--context",
        type=positive,
        default=0,
        metavar="N",
        help="most tokens per request (default: the model's)",
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"key that clients must send (also: {KEY_VARIABLE})")
    add_speculate(parser)
    add_threads(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    _check(args)
    try:
        from losa_deploy.runtimes.server.app import create_app
        from losa_deploy.runtimes.server.prepare import Model
        from losa_deploy.runtimes.server.run import LOOPBACK, bind, run, url
    except ImportError as error:
        raise MissingError(
            f"`losa-deploy serve` needs {error.name}, which is not installed.",
            hint='Run `pip install "losa-deploy[serve]"`.',
        ) from None
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.text.tokenizer import load_tokenizer

    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE, "")
    if args.host not in LOOPBACK and not key:
        console.warn(f"everybody who reaches {args.host} can use this server; --api-key asks for a key.")
    runtime = pick_runtime(args.model, args.runtime)
    with bind(args.host, args.port) as listening:
        tokenizer = load_tokenizer(args.model)
        engine = _engine(runtime, args, tokenizer, console)
        try:
            name = args.model_name or _name(args.model.absolute())
            model = Model(name, tokenizer, engine, _modified(args.model))
            app = create_app(model, key=key, log=console.warn, access=console.detail)
            run(
                app,
                listening,
                ready=lambda: _ready(url(listening), model.name, engine, console),
                log=console.warn,
            )
        finally:
            engine.close()


def _check(args: argparse.Namespace) -> None:
    check_speculate(args)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}, expected 0 to 65535.", hint=f"Default: {PORT}.")
    if args.queue < 0:
        raise UsageError(f"--queue is {args.queue}, expected 0 or more.", hint=f"Default: {QUEUE}.")
    if args.api_key == "":
        raise UsageError("--api-key is empty.", hint="Leave it out, or give a key.")


def _engine(runtime: Runtime, args: argparse.Namespace, tokenizer: Tokenizer, console: Console) -> Engine:
    """Parallel slots where the runtime has them, else one session and a queue."""
    from losa_deploy.cli.stages import warn_of_fallback
    from losa_deploy.runtimes.server.sequential import QueueEngine
    from losa_deploy.runtimes.server.slots import ParallelRuntime, SlotEngine

    threads = thread_count(args)
    if isinstance(runtime, ParallelRuntime):
        drafts = open_drafts(args, tokenizer, console)
        slots = runtime.open_slots(
            args.model, threads=threads, slots=args.parallel or PARALLEL, context=args.context
        )
        warn_of_fallback(runtime, console)
        return SlotEngine(runtime.name, slots, queue=args.queue, log=console.warn, drafts=drafts)
    if args.parallel is not None and args.parallel > 1:
        raise UsageError(
            f"--parallel is {args.parallel}, but the runtime {runtime.name} answers one request at a time.",
            hint="Leave --parallel out (others wait, see --queue), or serve a GGUF file.",
        )
    drafts = open_drafts(args, tokenizer, console)
    session = runtime.open(args.model, threads=threads)
    warn_of_fallback(runtime, console)
    require_rewinding(session, args, runtime)
    return QueueEngine(
        runtime.name,
        session,
        queue=args.queue,
        context=args.context,
        log=console.warn,
        drafts=drafts,
    )


def _name(path: Path) -> str:
    """Of a folder, or of a file without its suffix."""
    return path.stem if path.is_file() else path.name


def _modified(path: Path) -> int:
    return int(path.stat().st_mtime)


def _ready(address: str, name: str, engine: Engine, console: Console) -> None:
    if console.json:
        console.result_json(
            {
                "schema": "losa.serve/1",
                "url": f"{address}/v1",
                "model": name,
                "runtime": engine.name,
                "slots": engine.slots,
                "queue": engine.queue,
                "context_length": engine.context_length,
            }
        )
    console.info(
        f"Serving {name} at {address}/v1 with {engine.name}: {engine.slots} at once, "
        f"{engine.queue} waiting, {engine.context_length or 'any number of'} tokens each. Ctrl-C ends it."
    )


COMMAND = Command(
    name="serve",
    summary="answer OpenAI-compatible requests over HTTP",
    examples=(
        "losa-deploy serve -m build/demo",
        "losa-deploy serve -m build/demo --port 8081 --model-name demo --queue 8",
    ),
    add_arguments=_add,
    run=_run,
)
