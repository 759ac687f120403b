"""`losa-deploy chat`: a conversation; answers on stdout, everything else on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.drafts import check_speculate, open_session
from losa_deploy.cli.generate import add_model_folder, add_sampling, sampling
from losa_deploy.console import Console
from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from losa_deploy.runtimes.chat import ChatSession

PROMPT = "> "


def _add(parser: argparse.ArgumentParser) -> None:
    add_model_folder(parser)
    add_sampling(parser)


def _run(args: argparse.Namespace, console: Console) -> None:
    sampling(args)
    check_speculate(args)
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.runtimes.chat import ChatSession
    from losa_deploy.runtimes.speculation import Counts
    from losa_deploy.text.tokenizer import load_tokenizer

    runtime = pick_runtime(args.model, args.runtime)
    tokenizer = load_tokenizer(args.model)
    session = open_session(args, runtime, tokenizer, Counts(), console)
    try:
        chat = ChatSession(
            session,
            tokenizer,
            sampling(args),
            system=args.system,
            notice=lambda text: console.info(f"[{text}]"),
        )
        console.info(
            f"{args.model} in {runtime.name}. /reset forgets the conversation, /exit or Ctrl-D ends it."
        )
        for line in _lines(console):
            if not _turn(chat, line, console, show=not args.json):
                break
        if args.json:
            messages = [dict(message) for message in chat.messages]
            console.result_json({"schema": "losa.chat/1", "runtime": runtime.name, "messages": messages})
    finally:
        session.close()


def _turn(chat: ChatSession, line: str, console: Console, *, show: bool) -> bool:
    """Answer one line, streamed if `show`; False when the conversation is over."""
    if line in ("/exit", "/quit"):
        return False
    if line == "/reset":
        chat.reset()
        console.info("[The conversation starts afresh.]")
        return True
    try:
        for piece in chat.reply(line):
            if show:
                console.stream(piece)
        if show:
            console.stream("\n")
    except InputError as error:
        console.error(error)
    return True


def _lines(console: Console) -> Iterator[str]:
    """Non-empty lines of stdin; the prompt is shown on a terminal only, on stderr."""
    shown = PROMPT if sys.stdin.isatty() and not console.quiet else ""
    while True:
        console.err.write(shown)
        console.err.flush()
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            console.err.write("\n")
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


COMMAND = Command(
    name="chat",
    summary="hold a conversation with a model, streamed",
    examples=(
        "losa-deploy chat -m build/demo",
        "losa-deploy chat -m build/demo --system 'Answer briefly.' --temperature 0.7",
    ),
    add_arguments=_add,
    run=_run,
)
