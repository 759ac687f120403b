"""What `torchrun` and `accelerate launch` tell the processes that they start; no torch here."""

from __future__ import annotations

import os

from losa_deploy.errors import UsageError


def size() -> int:
    """How many processes the launcher started; 1 without one."""
    return max(1, _number("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return _number("RANK", 0) if size() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine this is, and so which GPU it has."""
    return _number("LOCAL_RANK", 0) if size() > 1 else 0


def neighbours() -> int:
    """How many of them share this machine, this one included."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if size() > 1 else 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(
            f"{name} is {text!r}, expected a number as a launcher sets it.",
            hint="Start it with torchrun or accelerate launch, or unset RANK and WORLD_SIZE.",
        )
    return int(text)
