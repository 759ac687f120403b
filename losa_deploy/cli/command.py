"""What a command is to the program: one `Command` value per file of this folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from losa_deploy.console import Console


@dataclass(frozen=True)
class Command:
    """A subcommand: `run` writes the result through the console and raises a `LosaError` if it cannot."""

    name: str
    summary: str
    examples: tuple[str, str]
    """Two complete command lines; a test parses them."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], None]
    resumable: bool = False
    """True: running the same line again continues where an interruption stopped it."""
    together: bool = False
    """True: several processes of a launcher do it together; the others refuse to start in one."""
