"""The argument parser: built from the commands, errors as `UsageError` with near matches.

argparse and not a command-line framework, because a help page has to come in under 0.3 s on a
slow machine and the recipe flags come from a table.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NoReturn

from losa_deploy import __version__
from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_output_flags
from losa_deploy.errors import UsageError

MODULES = (
    "compress_and_export",
    "compress",
    "merge",
    "export",
    "inspect",
    "verify",
    "bench",
    "evaluate",
    "generate",
    "chat",
    "serve",
    "ggml_backend",
    "formats",
    "doctor",
)
"""Command files of this folder, in the order of the help page."""

PROGRAM = "losa-deploy"
_WIDTH = 100


@cache
def commands() -> dict[str, Command]:
    """Name → command."""
    found: dict[str, Command] = {}
    for module in MODULES:
        command: Command = importlib.import_module(f"losa_deploy.cli.{module}").COMMAND
        found[command.name] = command
    return found


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """The same text on every terminal width and Python version, so that docs/cli.md can be checked."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH, max_help_position=34)
        # Python 3.11 forgets the indentation of subcommands when it computes this column.
        self._action_max_length = 26

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        return names if action.nargs == 0 else f"{names} {self._format_args(action, action.dest.upper())}"


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's words into ours."""
        text = re.sub(r"^argument ([^:]+): ", r"\1: ", message)
        raise UsageError(f"{text[:1].upper()}{text[1:]}.", hint=f"See `{self.prog} --help`.")


def build_parser() -> Parser:
    """The whole parser, with one subparser per command."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND [OPTIONS]",
        description="Make weight sparsity pay on ordinary CPUs: compress, merge, export, prove.",
        epilog=_examples((f"{PROGRAM} compress-and-export --format onnx", f"{PROGRAM} doctor")),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in commands().values():
        _add_command(subparsers, command)
    return parser


def command_help(name: str) -> str:
    """The help page of one command."""
    return _children(build_parser())[name].format_help()


def _children(parser: Parser) -> Mapping[str, Parser]:
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    children: Mapping[str, Parser] = found.choices
    return children


def _add_command(subparsers: argparse._SubParsersAction[Parser], command: Command) -> None:
    child = subparsers.add_parser(
        command.name,
        prog=f"{PROGRAM} {command.name}",
        help=command.summary,
        usage=f"{PROGRAM} {command.name} [OPTIONS]",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=_examples(command.examples),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    command.add_arguments(child)
    add_output_flags(child)
    positionals = [a.metavar or a.dest for a in child._get_positional_actions()]
    child.usage = " ".join([f"{PROGRAM} {command.name}", *map(str, positionals), "[OPTIONS]"])


def _examples(lines: Sequence[str]) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `UsageError` with near matches for unknown commands and flags."""
    names = list(commands())
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        near = difflib.get_close_matches(argv[0], names, n=2, cutoff=0.5)
        hint = f"Did you mean `{PROGRAM} {near[0]}`?" if near else f"See `{PROGRAM} --help`."
        raise UsageError(f"There is no command {argv[0]!r}.", hint=hint)
    args, extra = parser.parse_known_args(argv)
    if extra:
        raise _unknown_argument(parser, argv[0], extra[0])
    return args


def _unknown_argument(parser: Parser, command: str, argument: str) -> UsageError:
    child = _children(parser).get(command, parser)
    if not argument.startswith("-"):
        return UsageError(f"{argument!r} is one argument too many.", hint=f"See `{child.prog} --help`.")
    flag = argument.split("=")[0]
    near = difflib.get_close_matches(flag, child._option_string_actions, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"See `{child.prog} --help`."
    return UsageError(f"`{PROGRAM} {command}` has no flag {flag}.", hint=hint)
