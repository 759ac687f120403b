"""What a pass of several rows takes, assumed or measured: by it drafts are made or left."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Protocol

ASSUMED_ROW = 0.25
"""A further row of a pass, in passes of one row, where nothing was measured."""
SAMPLES, ENOUGH, STALE = 5, 3, 500
"""Times kept for a row count, those it takes to believe them, and passes after which they are forgotten."""


class Costs(Protocol):
    """What passes of several rows take."""

    def __call__(self, rows: int) -> float:
        """Time of a pass with so many rows, in passes of one row."""
        ...

    def record(self, rows: int, seconds: float) -> None:
        """A pass took so long."""
        ...


class TimedCosts(Costs, Protocol):
    """Costs that are known as times too."""

    def seconds(self, rows: int) -> float | None:
        """Of a pass with so many rows; None if it is not known."""
        ...


class AssumedCosts:
    """Always the same, so that the same text gets the same passes in every run."""

    def __call__(self, rows: int) -> float:
        """One pass, and a part of one for each further row."""
        return 1.0 + ASSUMED_ROW * (rows - 1)

    def record(self, rows: int, seconds: float) -> None:
        """Nothing is learnt."""


class MeasuredCosts:
    """Medians of recent passes; what is unknown, or was measured long ago, is assumed and so tried again."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._passes = 0
        self._last: dict[int, int] = {}

    def __call__(self, rows: int) -> float:
        """As measured, with passes of one row as the unit."""
        one, several = self.seconds(1), self.seconds(rows)
        return several / one if one and several else AssumedCosts()(rows)

    def seconds(self, rows: int) -> float | None:
        """Of a pass with so many rows; None if it is not known, or not any more."""
        times = self._times.get(rows, ())
        fresh = self._passes - self._last.get(rows, 0) <= STALE
        return median(times) if len(times) >= ENOUGH and fresh else None

    def record(self, rows: int, seconds: float) -> None:
        """Keep it, and forget what is too old to be compared with it."""
        self._passes += 1
        if self._passes - self._last.get(rows, 0) > STALE:
            self._times.pop(rows, None)
        self._last[rows] = self._passes
        self._times.setdefault(rows, deque(maxlen=SAMPLES)).append(seconds)
