"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, label)`; `total` is constant within a stage."""


def no_progress(done: int, total: int, label: str) -> None:
    """The progress callback of a caller that shows none."""
