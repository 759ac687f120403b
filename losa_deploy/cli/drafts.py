"""`--speculate` and `--draft` of `generate`, `chat` and `serve`: where drafts come from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.interfaces import Runtime, Session
    from losa_deploy.runtimes.draft_model import DraftModel
    from losa_deploy.runtimes.speculation import Counts, Drafts
    from losa_deploy.text.tokenizer import Tokenizer

DRAFT = "draft"
"""The mode in which a second model drafts."""


def add_speculate(parser: argparse.ArgumentParser) -> None:
    """Whether tokens are drafted, and by what."""
    parser.add_argument(
        "--speculate",
        choices=("off", "ngram", "auto", DRAFT),
        default="off",
        metavar="MODE",
        help="draft what followed the same words before: off (default), ngram, or auto (by measured times); "
        "or what a second model says: draft",
    )
    parser.add_argument(
        "--draft",
        type=Path,
        metavar="MODEL",
        help="model of --speculate draft: smaller or more compressed, with the same tokenizer",
    )


def check_speculate(args: argparse.Namespace) -> None:
    """Raise `UsageError` where one of the two flags is given without the other."""
    if args.speculate == DRAFT and args.draft is None:
        raise UsageError(
            "--speculate draft needs a second model.",
            hint="Add --draft MODEL, e.g. a more compressed one of the same source; or use --speculate auto.",
        )
    if args.draft is not None and args.speculate != DRAFT:
        raise UsageError(
            f"--draft {args.draft} says nothing about --speculate {args.speculate}.",
            hint="Add --speculate draft, or leave --draft out.",
        )


def open_session(
    args: argparse.Namespace, runtime: Runtime, tokenizer: Tokenizer, counts: Counts, console: Console
) -> Session:
    """The model in `runtime`, with the drafts that the flags ask for; `counts` hears of them."""
    from losa_deploy.cli.stages import warn_of_fallback
    from losa_deploy.runtimes.speculation import speculative

    drafts = open_drafts(args, tokenizer, console)
    session = runtime.open(args.model, threads=thread_count(args))
    warn_of_fallback(runtime, console)
    require_rewinding(session, args, runtime)
    return speculative(session, drafts, counts)


def open_drafts(args: argparse.Namespace, tokenizer: Tokenizer, console: Console) -> Drafts | None:
    """What drafts for a model with this tokenizer; None if nothing does.

    Raises `InputError` for a second model with another vocabulary.
    """
    from losa_deploy.runtimes.speculation import text_drafts

    if args.speculate != DRAFT:
        return text_drafts(args.speculate)
    return _draft_model(args.draft, thread_count(args), tokenizer, console)


def _draft_model(path: Path, threads: int, tokenizer: Tokenizer, console: Console) -> DraftModel:
    """The vocabulary is looked at before weights are loaded."""
    from losa_deploy.cli.stages import warn_of_fallback
    from losa_deploy.interfaces import RewindableSession
    from losa_deploy.pipeline import pick_runtime
    from losa_deploy.runtimes.draft_model import DraftModel, require_same_vocabulary
    from losa_deploy.text.tokenizer import load_tokenizer

    runtime = pick_runtime(path, None)
    require_same_vocabulary(tokenizer, load_tokenizer(path))
    session = runtime.open(path, threads=threads)
    warn_of_fallback(runtime, console)
    if not isinstance(session, RewindableSession):
        session.close()
        raise _cannot_rewind(runtime, f"--draft {path}")
    return DraftModel(session, warn=console.warn)


def require_rewinding(session: Session, args: argparse.Namespace, runtime: Runtime) -> None:
    """Raise `UsageError` if a second model would draft for a session that cannot take tokens back."""
    from losa_deploy.interfaces import RewindableSession

    if args.speculate == DRAFT and not isinstance(session, RewindableSession):
        session.close()
        raise _cannot_rewind(runtime, f"--model {args.model}")


def _cannot_rewind(runtime: Runtime, what: str) -> UsageError:
    return UsageError(
        f"{what} opens in the runtime {runtime.name}, which cannot take drafted tokens back.",
        hint="Give a GGUF file, or an ONNX folder with --runtime ort.",
    )
