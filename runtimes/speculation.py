"""Drafts, checked in one pass of several rows. Here they come from the text itself: what followed its words.

A drafted token counts only if the caller then chooses it, with the random numbers of a run without
drafts. So drafts change the speed, and the text only as far as logits of several rows at once differ
from those of single ones in their last digits (docs/serving.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from losa_deploy.interfaces import RewindableSession, Session

from .pass_costs import AssumedCosts, Costs, MeasuredCosts

Mode = Literal["off", "ngram", "auto"]
"""Drafts from the text: none, by assumed costs, or by measured ones."""
SHORTEST_MATCH, LONGEST_MATCH = 2, 4
"""Tokens at the end of the text that have to have come before."""
DRAFTS = (0, 1, 3, 7)
"""Tokens of a draft; with the one before them these are the row counts that kernels like."""
SURE = 8
"""A match of so many tokens says no more than one of even more."""
FADING = 0.9
"""What an observation weighs after the next one of its kind."""


@dataclass
class Counts:
    """Tokens that were drafted, and those of them that were chosen."""

    drafted: int = 0
    accepted: int = 0


class Foresight(Protocol):
    """What foresees the tokens of one sequence."""

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        ...

    def draft(self, room: int) -> tuple[int, ...]:
        """Up to `room` tokens that are worth checking after the text; often none."""
        ...


class Drafts(Protocol):
    """Where drafts come from."""

    @property
    def costs(self) -> Costs:
        """What decides about them; whoever checks a draft records its passes here."""
        ...

    def begin(self, prompt: Sequence[int], vocab_size: int) -> Foresight:
        """Foresee what follows `prompt`, in tokens below `vocab_size`."""
        ...

    def close(self) -> None:
        """Free what they come from."""
        ...


@dataclass
class Agreement:
    """How often the text went on as foreseen; it starts as one time in two."""

    right: float = 1.0
    seen: float = 2.0

    def add(self, right: bool) -> None:
        self.right = FADING * self.right + right
        self.seen = FADING * self.seen + 1.0

    @property
    def share(self) -> float:
        return self.right / self.seen


class Drafter:
    """One sequence: foresees its next tokens, and says how many of them are worth a pass.

    Each token is compared with what was foreseen, drafted or not, so that a text which begins to
    repeat itself is noticed without a try.
    """

    def __init__(self, prompt: Sequence[int], costs: Costs) -> None:
        self._costs = costs
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        """A few tokens in a row → where the text went on after them the last time."""
        self._next: int | None = None
        """Where in the text the foreseen next token stands."""
        self._matched = 0
        self._agreements = [Agreement() for _ in range(SURE + 1)]
        """By the length of the match."""
        for token in prompt:
            self._append(token)
        self._look_up()

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        foreseen = self._next
        if foreseen is not None:
            right = self._text[foreseen] == token
            self._agreements[self._matched].add(right)
        self._append(token)
        if foreseen is not None and right:
            self._next, self._matched = foreseen + 1, min(SURE, self._matched + 1)
        else:
            self._look_up()

    def draft(self, room: int) -> tuple[int, ...]:
        """Up to `room` tokens that are worth checking after the text; often none."""
        if self._next is None:
            return ()
        fitting = [count for count in DRAFTS if count <= room]
        count = max(fitting, key=lambda n: (self._expected(n) / self._costs(1 + n), -n), default=0)
        found: list[int] = []
        for place in range(self._next, self._next + count):
            # Beyond the end of the text the draft repeats itself.
            found.append(self._text[place] if place < len(self._text) else found[place - len(self._text)])
        return tuple(found)

    def _append(self, token: int) -> None:
        for size in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
            if len(self._text) >= size:
                self._after[tuple(self._text[-size:])] = len(self._text)
        self._text.append(token)

    def _look_up(self) -> None:
        self._next, self._matched = None, 0
        for size in range(min(LONGEST_MATCH, len(self._text)), SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(self._text[-size:]))
            if place is not None:
                self._next, self._matched = place, size
                return

    def _expected(self, count: int) -> float:
        """Tokens that a pass with a draft of `count` gives on average."""
        total = chance = 1.0
        for index in range(count):
            chance *= self._agreements[min(SURE, self._matched + index)].share
            total += chance
        return total


class TextDrafts:
    """What followed the same words earlier in the text."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs

    def begin(self, prompt: Sequence[int], vocab_size: int) -> Drafter:
        """Of tokens that were in the text, so in the vocabulary."""
        del vocab_size
        return Drafter(prompt, self.costs)

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class _Ahead:
    """Drafted tokens that the session holds, and the logits after each; what was not chosen yet."""

    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)


class SpeculativeSession:
    """A session whose steps are often answered by an earlier pass; to its caller it is like any other."""

    def __init__(self, session: RewindableSession, drafts: Drafts, counts: Counts) -> None:
        """Takes `session` and `drafts` over."""
        self._session = session
        self._drafts = drafts
        self._counts = counts
        self._text: list[int] = []
        self._ahead = _Ahead()
        self._drafter: Foresight | None = None
        self._can_rewind = True
        self.vocab_size = session.vocab_size
        self.context_length = session.context_length

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        self._reset()
        return self._session.logits(tokens)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        self._reset()
        logits = self._session.prefill(tokens)
        self._text = list(tokens)
        self._drafter = self._drafts.begin(tokens, self.vocab_size) if self._can_rewind else None
        return logits

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        if self._drafter is None:
            return self._session.step(token)
        self._drafter.add(token)
        ahead = self._ahead
        if ahead.tokens and ahead.tokens[0] == token:
            self._text.append(ahead.tokens.pop(0))
            self._counts.accepted += 1
            return ahead.logits.pop(0)
        self._drop_ahead()
        return self._pass(token)

    def close(self) -> None:
        """Free the session and the drafts."""
        self._reset()
        self._drafts.close()
        self._session.close()

    def _reset(self) -> None:
        self._text, self._ahead, self._drafter = [], _Ahead(), None

    def _drop_ahead(self) -> None:
        """Take what was drafted and not chosen out of the session."""
        ahead, self._ahead = self._ahead, _Ahead()
        if ahead.tokens and not self._session.rewind(len(self._text)):
            self._session.prefill(self._text)
            self._can_rewind = False

    def _pass(self, token: int) -> NDArray[np.float32]:
        draft = self._draft()
        start = time.perf_counter()
        rows = self._session.extend((token, *draft)) if draft else self._session.step(token)[None]
        self._drafts.costs.record(len(rows), time.perf_counter() - start)
        self._text.append(token)
        self._counts.drafted += len(draft)
        self._ahead = _Ahead(list(draft), list(rows[1:]))
        first: NDArray[np.float32] = rows[0]
        return first

    def _draft(self) -> tuple[int, ...]:
        if self._drafter is None or not self._can_rewind:
            return ()
        room = self.context_length - len(self._text) - 1 if self.context_length else max(DRAFTS)
        return self._drafter.draft(room)


def text_drafts(mode: Mode) -> TextDrafts | None:
    """What `mode` drafts with; None where it drafts nothing."""
    if mode == "off":
        return None
    return TextDrafts(MeasuredCosts() if mode == "auto" else AssumedCosts())


def speculative(session: Session, drafts: Drafts | None, counts: Counts) -> Session:
    """`session` with these drafts; itself if there are none or it cannot take tokens back."""
    if drafts is None:
        return session
    if not isinstance(session, RewindableSession):
        drafts.close()
        return session
    return SpeculativeSession(session, drafts, counts)
