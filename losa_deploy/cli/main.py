"""Entry point: arguments in, exit code out; the one place where errors become messages."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from losa_deploy import launcher
from losa_deploy.cli.parser import PROGRAM, build_parser, commands, parse
from losa_deploy.console import Console, wants_color
from losa_deploy.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_OK, LosaError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see README, "Exit codes")."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(
        json="--json" in arguments,
        quiet="--quiet" in arguments,
        verbose="--verbose" in arguments,
        color=wants_color("--no-color" in arguments),
    )
    try:
        if launcher.rank():
            console = _follower(console)
        return _run(arguments, console)
    except SystemExit as stop:  # --help and --version
        return stop.code if isinstance(stop.code, int) else EXIT_BUG
    except KeyboardInterrupt:
        return _interrupted(arguments, console)
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_OK
    except LosaError as error:
        return _failed(error, console)
    except Exception as error:
        return _unexpected(error, console)


def _follower(console: Console) -> Console:
    """For all but the first process of a launcher: it says nothing but what goes wrong in it."""
    name = f"process {launcher.rank()} of {launcher.size()}: "
    nothing = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    return replace(console, out=nothing, quiet=True, color=False, prefix=name)


def _run(arguments: list[str], console: Console) -> int:
    # OpenMP's default is to spin for milliseconds at every barrier: beside another busy process the
    # same run then takes several times as long. Read once, when torch loads its OpenMP library.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = build_parser()
    if not arguments:
        console.err.write(parser.format_help())
        return 2
    args = parse(parser, arguments)
    if launcher.size() > 1 and not commands()[args.command].together:
        raise UsageError(
            f"{args.command} runs in one process, a launcher started {launcher.size()}.",
            hint="Run `losa-deploy compress` with the launcher, and the other commands without it.",
        )
    _go_offline(bool(getattr(args, "offline", False)))
    with console.guarded():
        commands()[args.command].run(args, console)
    return EXIT_OK


def _go_offline(offline: bool) -> None:
    """Before the hub library is imported, which reads these once; it asks the network unbidden otherwise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _failed(error: LosaError, console: Console) -> int:
    if console.prefix and isinstance(error, UsageError):
        return error.exit_code  # the first process says the same
    console.error(error)
    if console.verbose:
        console.detail("".join(traceback.format_exception(error)).rstrip())
    return error.exit_code


def _interrupted(arguments: list[str], console: Console) -> int:
    again = f" Resume with: {shlex.join([PROGRAM, *arguments])}" if _resumable(arguments) else ""
    kept = " Finished work is kept." if again else ""
    error = LosaError(f"Interrupted.{kept}", hint=again.strip())
    error.code, error.exit_code = "interrupted", EXIT_INTERRUPTED
    return _failed(error, console)


def _resumable(arguments: list[str]) -> bool:
    command = commands().get(arguments[0]) if arguments else None
    return command is not None and command.resumable


def _unexpected(error: Exception, console: Console) -> int:
    from losa_deploy.output import shortage_error

    shortage = shortage_error(error)
    if shortage is not None:
        return _failed(shortage, console)
    text = "".join(traceback.format_exception(error))
    bug = LosaError(
        f"This is a bug in losa-deploy: {type(error).__name__}: {error}.",
        hint=f"The traceback is in {_write_log(text)}; please report it with the command line.",
    )
    console.error(bug)
    console.detail(text.rstrip())
    return EXIT_BUG


def _write_log(text: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME")
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    home = Path(state) if state else Path.home() / ".local" / "state"
    for folder in (home / PROGRAM, Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        except OSError:
            continue
        return folder / name
    return Path(os.devnull)


def _silence_stdout() -> None:
    """After a broken pipe Python would complain again when it flushes stdout at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
