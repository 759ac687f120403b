"""`python -m losa_deploy.cli.page FILE` writes the command reference, docs/cli.md, from the program."""

from __future__ import annotations

import sys
from pathlib import Path

from losa_deploy import errors
from losa_deploy.cli.options import RECIPE_OPTIONS
from losa_deploy.cli.parser import PROGRAM, build_parser, command_help, commands

INTRODUCTION = f"""\
# Command line

Written by `make docs` from the program itself; a test fails when this page is stale.

stdout carries the result and nothing else; progress, log and warnings go to stderr. With `--json`
the result is one JSON document on stdout, and an error is one JSON document on stderr. A path that
is written appears whole or not at all: work happens in `<output>.partial`, which is renamed at the
end. `{PROGRAM}` started twice with the same line continues or reuses what is in `<output>.work`.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, "## Exit codes\n", _exit_codes(), "## Recipe flags\n", _recipe_flags()]
    parts += [f"## {PROGRAM}\n", _code(build_parser().format_help())]
    for name in commands():
        parts += [f"## {PROGRAM} {name}\n", _code(command_help(name))]
    return "\n".join(parts)


def _code(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def _exit_codes() -> str:
    rows = [
        (errors.EXIT_OK, "Done, all requested checks passed"),
        (errors.EXIT_BUG, "A bug in losa-deploy; the message names a log with the traceback"),
    ]
    kinds = sorted(errors.LosaError.__subclasses__(), key=lambda kind: kind.exit_code)
    rows += [(kind.exit_code, (kind.__doc__ or "").split(" (exit code")[0]) for kind in kinds]
    rows.append(
        (errors.EXIT_INTERRUPTED, "interrupted; finished work is kept, the message says how to resume")
    )
    lines = ["| Code | Meaning |", "| ---: | --- |", *(f"| {code} | {text} |" for code, text in rows)]
    return "\n".join(lines) + "\n"


def _recipe_flags() -> str:
    lines = [
        "Each flag sets one key of the recipe; `--set KEY=VALUE` reaches every key, `--print-recipe` shows",
        "all of them with the values in effect.\n",
        "| Flag | Key | Meaning |",
        "| --- | --- | --- |",
        *(f"| `{o.flag}` | `{o.key}` | {o.help.replace('|', chr(92) + '|')} |" for o in RECIPE_OPTIONS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
