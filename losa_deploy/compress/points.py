"""Where processes save the points that training goes on from, so that all go on from the same one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from losa_deploy.compress.partial import Partial, Point
from losa_deploy.compress.team import Team

Labels = tuple[str | int, ...]


class Points:
    """Points of a phase. One file, written by the first process, where all have the same parameters.

    Where they share them out (`sharded`), every process saves its rows in turn under two names: a kill
    between two processes' files leaves the point before.
    """

    def __init__(self, partial: Partial, team: Team, *, sharded: bool) -> None:
        self._partial, self._team, self._sharded = partial, team, sharded
        self._names = [f"point-{team.rank}-of-{team.count}-{slot}" for slot in "ab"] if sharded else ["point"]

    def saved(self, labels: Labels) -> Point | None:
        """The latest point that all processes have, None if there is none."""
        found = [self._partial.point(labels, name) for name in self._names]
        if not self._sharded:
            return found[0]
        for slot in sorted((0, 1), key=lambda slot: -self._least(found[slot])):
            point, least = found[slot], self._least(found[slot])
            if least >= 0 and self._least(point, -1) == -least:  # every process has the same number of steps
                self._names = self._names if slot else self._names[::-1]
                return point
        return None

    def _least(self, point: Point | None, sign: int = 1) -> int:
        """The fewest steps (or minus the most) that a process has in a slot; -1 where one has none."""
        own = torch.tensor(float(-1 if point is None else len(point.losses))) * sign
        if self._team.count > 1:
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MIN)
        return int(own)

    def due(self) -> bool:
        """Whether it is time to save: the first process says so to all that have to."""
        due = self._partial.due()
        if not self._sharded:
            return due and self._team.leads
        return bool(self._team.total(torch.tensor(float(due and self._team.leads))))

    def save(self, make: Callable[[], Point]) -> None:
        """Save a point."""
        self._partial.save_point(make(), self._names[0])
        self._names = self._names[::-1]
