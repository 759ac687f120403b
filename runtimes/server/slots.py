"""Several requests at once in one batch: prompts in chunks beside the next tokens of the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..speculation import DRAFTS, Drafts, Foresight
from .engine import Course, EngineFailure, Log, ThreadedEngine, Ticket

CHUNK_BESIDE = 64
"""Prompt tokens of one pass while other requests generate: they wait for the whole pass."""
SHORTEST_REUSE = 32
"""Tokens a prompt must share with what a slot holds before the rest of that is dropped and these are kept."""


@dataclass(frozen=True)
class Row:
    """One token of a batch: of which slot, where in its sequence, and whether its logits are wanted."""

    slot: int
    token: int
    position: int
    wanted: bool


class BatchSession(Protocol):
    """An open model with one key/value cache per slot."""

    vocab_size: int
    context_length: int
    """The most tokens of one slot."""
    slots: int
    batch: int
    """The most rows of one `decode`."""

    def decode(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """Append the rows to their slots; logits [vocab] of the wanted ones, in order.

        The rows of one slot are in order and begin where its sequence ends. If it raises, the
        contents of all slots are undefined until each was cut to 0.
        """
        ...

    def cut(self, slot: int, length: int) -> int:
        """Forget what the slot holds beyond its first `length` tokens; how many of these are kept."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@runtime_checkable
class ParallelRuntime(Protocol):
    """A runtime that can hold several sequences of one model."""

    name: str

    def open_slots(self, folder: Path, *, threads: int, slots: int, context: int) -> BatchSession:
        """Load the model with so many slots of `context` tokens each (0: the runtime's own choice)."""
        ...


@dataclass
class _Slot:
    number: int
    held: list[int] = field(default_factory=list)
    """Tokens whose keys and values the session has, those of an ended request too."""
    course: Course | None = None
    pending: list[int] = field(default_factory=list)
    """Tokens that the session has to be given before the next one can be chosen."""
    alone: bool = False
    """It was in a pass that failed: until it has passed by itself, it is computed by itself."""
    drafter: Foresight | None = None

    @property
    def ready(self) -> bool:
        """It needs one more token only: its reply has begun."""
        return self.course is not None and len(self.pending) == 1

    def shared(self, prompt: Sequence[int]) -> int:
        """Tokens at the start of `prompt` that are held; the last one of a prompt is always computed."""
        count = 0
        for held, wanted in zip(self.held, prompt[:-1], strict=False):
            if held != wanted:
                break
            count += 1
        return count if count >= SHORTEST_REUSE else 0


class SlotEngine(ThreadedEngine):
    """Continuous batching: requests join and leave between any two passes."""

    def __init__(
        self, name: str, session: BatchSession, *, queue: int, log: Log, drafts: Drafts | None = None
    ) -> None:
        """Takes `session` and `drafts` over."""
        super().__init__(
            name,
            slots=session.slots,
            queue=queue,
            context_length=session.context_length,
            vocab_size=session.vocab_size,
            log=log,
        )
        self._session = session
        self._drafts = drafts
        self._can_cut = True
        self._places = [_Slot(number) for number in range(session.slots)]
        self.start()

    def _work(self) -> None:
        while not self._closed:
            try:
                self._admit()
                self._drop_cancelled()
                if rows := self._rows():
                    self._pass(rows)
            except Exception:
                self._log(traceback.format_exc())
                self._fail("the runtime failed")
        self._fail("the server is shutting down")

    def _admit(self) -> None:
        """Give waiting requests to free slots; waits for one if nothing runs."""
        while any(slot.course is None for slot in self._places):
            idle = all(slot.course is None for slot in self._places)
            ticket = self._next(wait=idle)
            if ticket is None:
                return
            self._start(ticket)

    def _start(self, ticket: Ticket) -> None:
        """In the free slot that holds the longest start of the prompt, else in the first one."""
        course = Course(ticket, self.context_length, self._count_token)
        free = [slot for slot in self._places if slot.course is None]
        slot = max(free, key=lambda s: (s.shared(course.prompt), -s.number))
        slot.course = course
        kept = self._session.cut(slot.number, slot.shared(course.prompt))
        del slot.held[kept:]
        slot.pending = list(course.prompt[kept:])
        if self._drafts is not None and self._can_cut:
            slot.drafter = self._drafts.begin(course.prompt, self.vocab_size)
        self._count_prompt(len(course.prompt), cached=kept)

    def _drop_cancelled(self) -> None:
        for slot in self._places:
            if slot.course is not None and slot.course.ticket.cancelled:
                self._release(slot)

    def _rows(self) -> list[Row]:
        """The next token of each reply, then prompts in the order of the slots, as far as they fit."""
        busy = [slot for slot in self._places if slot.course is not None]
        busy = [slot for slot in busy if slot.alone][:1] or busy
        replying = [slot for slot in busy if slot.ready]
        room = self._session.batch - len(replying)
        if replying:
            room = min(room, CHUNK_BESIDE)
        rows = [Row(slot.number, slot.pending[0], len(slot.held), True) for slot in replying]
        for slot in busy:
            if slot.ready or room <= 0:
                continue
            part = slot.pending[:room]
            room -= len(part)
            whole = len(part) == len(slot.pending)
            rows += [
                Row(slot.number, token, len(slot.held) + i, whole and i == len(part) - 1)
                for i, token in enumerate(part)
            ]
        if len(busy) == 1 and replying:  # passes that several requests share have several rows anyway
            rows += self._drafted(replying[0])
        return rows

    def _drafted(self, slot: _Slot) -> list[Row]:
        """Rows after the next token of a slot, for what its reply may go on with."""
        if slot.drafter is None:
            return []
        first = len(slot.held) + 1
        room = min(self._session.batch - 1, max(DRAFTS))
        if self.context_length:
            room = min(room, self.context_length - first)
        draft = slot.drafter.draft(room)
        return [Row(slot.number, token, first + i, True) for i, token in enumerate(draft)]

    def _pass(self, rows: Sequence[Row]) -> None:
        start = time.perf_counter()
        try:
            logits = self._session.decode(rows)
        except Exception:
            self._log(traceback.format_exc())
            self._start_over({row.slot for row in rows})
            return
        seconds = time.perf_counter() - start
        for row in rows:
            slot = self._places[row.slot]
            slot.held.append(row.token)
            del slot.pending[:1]
        wanted = [row for row in rows if row.wanted]
        if len(wanted) == len(rows) and len({row.slot for row in rows}) == 1:
            if self._drafts is not None:
                self._drafts.costs.record(len(rows), seconds)
            self._choose_among(self._places[rows[0].slot], rows, logits)
            return
        for row, values in zip(wanted, logits, strict=True):
            self._choose(self._places[row.slot], values)

    def _choose_among(self, slot: _Slot, rows: Sequence[Row], logits: Sequence[NDArray[np.float32]]) -> None:
        """The next tokens of one slot after a draft: those drafted count as long as they are chosen."""
        length = rows[0].position + 1
        self._counts.drafted += len(rows) - 1
        for index, values in enumerate(logits):
            token = self._choose(slot, values)
            if token is None or index + 1 == len(rows) or token != rows[index + 1].token:
                break
            slot.pending = []
            length += 1
            self._counts.accepted += 1
        if length < len(slot.held):
            self._take_back(slot, length)

    def _take_back(self, slot: _Slot, length: int) -> None:
        """Drop what a slot holds beyond its first `length` tokens; if it cannot, nothing is drafted again."""
        kept = self._session.cut(slot.number, length)
        if kept < length:
            self._can_cut = False
            slot.drafter = None
            if slot.course is not None:
                slot.pending = slot.held[kept:length] + slot.pending
        del slot.held[kept:]

    def _start_over(self, failed: set[int]) -> None:
        """After a pass of these slots failed: all are computed anew, those of the pass one by one.

        A slot that fails by itself is what failed, and its request ends.
        """
        for slot in self._places:
            self._session.cut(slot.number, 0)
            if slot.course is not None:
                slot.pending = slot.held + slot.pending
            slot.held = []
            if slot.number not in failed or slot.course is None:
                continue
            slot.alone = len(failed) > 1
            if not slot.alone:
                slot.course.end = EngineFailure("the runtime failed")
                self._release(slot)

    def _choose(self, slot: _Slot, logits: NDArray[np.float32]) -> int | None:
        """The next token of one slot, None at its end; a failure here is its own, not that of the others."""
        assert slot.course is not None
        slot.alone = False
        try:
            token = slot.course.take(logits)
        except Exception:
            self._log(traceback.format_exc())
            slot.course.end = EngineFailure("the runtime failed")
            token = None
        if token is None:
            self._release(slot)
            return None
        if slot.drafter is not None:
            slot.drafter.add(token)
        slot.pending = [token]
        return token

    def _release(self, slot: _Slot) -> None:
        assert slot.course is not None
        course, slot.course, slot.pending, slot.alone = slot.course, None, [], False
        slot.drafter = None
        self._done(course.ticket, course.end)

    def _fail(self, words: str) -> None:
        """End everything that runs; nothing that the session holds is relied on afterwards."""
        for slot in self._places:
            slot.held = []
            if slot.course is not None:
                slot.course.end = EngineFailure(words)
                self._release(slot)

    def _free(self) -> None:
        if self._drafts is not None:
            self._drafts.close()
        self._session.close()
