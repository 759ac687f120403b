"""The only module that prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from losa_deploy.errors import LosaError

if TYPE_CHECKING:
    from losa_deploy.progress import Progress

_RED, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"
_STEPS = 10
"""Lines a stage prints when there is no terminal: one for every 10 %."""


@dataclass
class Console:
    """Where a command writes. `json` concerns errors; a command decides about its own result."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True
    prefix: str = ""
    """Before every line: which of several processes says it."""

    def result(self, text: str) -> None:
        """One piece of the result, with a line end, on stdout."""
        self.out.write(text + "\n")
        self.out.flush()

    def result_json(self, document: Mapping[str, object]) -> None:
        """The result as one JSON document on stdout; NaN is refused (`ValueError`)."""
        self.result(json.dumps(document, indent=2, allow_nan=False))

    def stream(self, piece: str) -> None:
        """A piece of streamed text on stdout, shown at once."""
        self.out.write(piece)
        self.out.flush()

    def info(self, text: str) -> None:
        """A line about what happens now; silent under --quiet."""
        if not self.quiet:
            self._line(text)

    def detail(self, text: str) -> None:
        """A line for --verbose only."""
        if self.verbose:
            self._line(text)

    def warn(self, text: str) -> None:
        """A warning; shown under --quiet too."""
        self._line(f"{self._paint('warning:', _YELLOW)} {text}")

    def error(self, error: LosaError) -> None:
        """The one line of an error, or the `losa.error/1` document under --json."""
        if self.json:
            self._line(json.dumps(error.to_json()))
        else:
            self._line(f"{self._paint('error:', _RED)} {' '.join(str(error).split())}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """A progress callback for one stage: a bar on a terminal, one line per 10 % elsewhere."""
        if self.quiet:
            yield lambda done, total, label: None
        elif self._terminal(self.err):
            with self._bar(name) as progress:
                yield progress
        else:
            yield self._lines(name)

    def _lines(self, name: str) -> Progress:
        shown, last_done, last_total = -1, 0, 0

        def progress(done: int, total: int, label: str) -> None:
            nonlocal shown, last_done, last_total
            if done < last_done or total != last_total:  # the next part of a stage with several
                shown = -1
            last_done, last_total = done, total
            step = _STEPS * done // max(1, total)
            if step > shown:
                shown = step
                self._line(f"{name}: {100 * done // max(1, total):3d} % ({done}/{total}) {label}".rstrip())

        return progress

    @contextmanager
    def _bar(self, name: str) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.fields[stage]:<9}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        rich_console = RichConsole(file=self.err, no_color=not self.color, highlight=False)
        with RichProgress(
            *columns, console=rich_console, redirect_stdout=False, redirect_stderr=False
        ) as bar:
            task = bar.add_task("", total=None, stage=name)

            def progress(done: int, total: int, label: str) -> None:
                bar.update(task, completed=done, total=total, description=label)

            yield progress

    def _line(self, text: str) -> None:
        self.err.write(f"{self.prefix}{text}\n")
        self.err.flush()

    def _paint(self, text: str, code: str) -> str:
        return f"{code}{text}{_PLAIN}" if self.color and self._terminal(self.err) else text

    @staticmethod
    def _terminal(stream: TextIO) -> bool:
        return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"

    @contextmanager
    def captured(self, log: Path) -> Iterator[None]:
        """Send what libraries print (Python and C, both streams) to `log`; ours still reaches the user.

        Under --verbose nothing is captured.
        """
        if self.verbose:
            yield
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as sink, self._divert(sink, 1, 2):
            yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep stdout for the result: what anything else prints there goes to stderr."""
        with self._divert(self.err, 1):
            yield

    @contextmanager
    def _divert(self, sink: TextIO, *descriptors: int) -> Iterator[None]:
        out, err = self.out, self.err
        with _redirected(sink, descriptors) as copies:
            self.out = copies(out)
            self.err = copies(err)
            try:
                yield
            finally:
                self.out, self.err = out, err


@contextmanager
def _redirected(sink: TextIO, descriptors: Sequence[int]) -> Iterator[Callable[[TextIO], TextIO]]:
    """Point file descriptors and `sys.stdout`/`sys.stderr` at `sink`; yields stream → undiverted stream."""
    sys.stdout.flush()
    sys.stderr.flush()
    target = _number(sink)
    saved = {d: os.dup(d) for d in descriptors} if target is not None else {}
    kept: list[TextIO] = []

    def undiverted(stream: TextIO) -> TextIO:
        number = _number(stream)
        if number not in saved:
            return stream
        copy = os.fdopen(os.dup(saved[number]), "w", encoding="utf-8", errors="replace")
        kept.append(copy)
        return copy

    python_err = redirect_stderr(sink) if 2 in descriptors else nullcontext()
    try:
        for descriptor in saved:
            os.dup2(target or 0, descriptor)
        with redirect_stdout(sink), python_err:
            yield undiverted
    finally:
        for copy in kept:
            copy.close()
        for descriptor, copy_of in saved.items():
            os.dup2(copy_of, descriptor)
            os.close(copy_of)


def _number(stream: TextIO) -> int | None:
    """File descriptor of a stream, None if it has none (e.g. under a test's capture)."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces; a column of numbers is right-aligned. No line ends with a space."""
    lines = [list(header), *(list(row) for row in rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    right = [all(_numeric(row[i]) for row in rows) for i in range(len(widths))]
    text = []
    for line in lines:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def _numeric(text: str) -> bool:
    return bool(text) and all(c in "0123456789.,+-±×%eE /" for c in text)


def wants_color(no_color: bool) -> bool:
    """False for --no-color or a non-empty `NO_COLOR`."""
    return not no_color and not os.environ.get("NO_COLOR")
