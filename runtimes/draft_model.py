"""Drafts from a second model: a smaller or more compressed one writes on, the first one checks.

The draft is what the second model finds most likely, so drawn texts are drafted too, only less well. A
token is drafted as long as it may be expected to be chosen (by how sure the second model is, and how often
it was right when it was as sure) and that is worth its share of two passes, by measured times. Where drafts
have not paid for a while they rest.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, LosaError
from losa_deploy.interfaces import RewindableSession
from losa_deploy.text.tokenizer import Tokenizer

from .pass_costs import MeasuredCosts, TimedCosts
from .speculation import DRAFTS, FADING, Agreement

LONGEST = max(DRAFTS)
"""Tokens of a draft."""
TRIAL = 3
"""Tokens of a draft by which passes are timed, whatever they may bring."""
CERTAINTIES = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Probabilities of the most likely token between which agreement is counted apart."""
CHUNK = 32
"""Tokens that are caught up with in one pass: each gives logits, which are large."""
FIRST_REST, LAST_REST = 32, 512
"""Passes without a try after drafts did not pay: first so many, then twice as many each time."""
PROOF = 16
"""Passes with drafts in a row after which an earlier failure is forgotten."""


def silent(line: str) -> None:
    """Tells nobody."""


@dataclass
class _Balance:
    """What drafts gave of late, in tokens, and cost, in passes of one row; they begin with some credit."""

    gained: float = 5.0
    spent: float = 4.0
    passes: int = 0

    def add(self, gained: int, cost: float) -> None:
        self.gained = FADING * self.gained + gained
        self.spent = FADING * self.spent + cost
        self.passes += 1

    @property
    def pays(self) -> bool:
        return self.gained >= self.spent


class DraftModel:
    """A second model, open: it holds one sequence, and follows whichever text it is asked about."""

    def __init__(
        self,
        session: RewindableSession,
        *,
        costs: TimedCosts | None = None,
        own_costs: TimedCosts | None = None,
        warn: Callable[[str], None] = silent,
    ) -> None:
        """Takes `session` over. `costs` are those of the model that checks, `own_costs` of this one."""
        self._warn = warn
        self.costs = costs or MeasuredCosts()
        self._own_costs = own_costs or MeasuredCosts()
        self._session = session
        self._held: list[int] = []
        """Tokens whose keys and values the session has."""
        self._usable = True
        self._agreements = [Agreement(low + high, 2.0) for low, high in pairwise(CERTAINTIES)]
        """By certainty; each starts as if the model knew how sure it may be."""
        self._usual = Agreement()
        self._balance = _Balance()
        self._resting, self._rest = 0, FIRST_REST

    def begin(self, prompt: Sequence[int], vocab_size: int) -> ModelDrafter:
        """Foresee what follows `prompt`, in tokens below `vocab_size`."""
        return ModelDrafter(self, prompt, min(vocab_size, self._session.vocab_size))

    def close(self) -> None:
        """Free the model."""
        self._session.close()

    def may_draft(self) -> bool:
        """Whether to try drafts in this pass: not while they rest, nor before passes without were timed."""
        if not self._usable or self.costs.seconds(1) is None:
            return False
        self._resting = max(0, self._resting - 1)
        return self._resting == 0

    def settle(self, gained: int, cost: float) -> None:
        """A pass that drafts were tried for gave `gained` tokens at `cost` passes of one row."""
        self._balance.add(gained, cost)
        if not self._balance.pays:
            self._balance, self._resting = _Balance(), self._rest
            self._rest = min(LAST_REST, 2 * self._rest)
        elif self._balance.passes >= PROOF:
            self._rest = FIRST_REST

    def learn(self, certainty: float, right: bool) -> None:
        """A token that the model was so sure of was chosen, or not."""
        self._agreement(certainty).add(right)
        self._usual.add(right)

    def chance(self, certainty: float) -> float:
        """Of a token that the model is so sure of to be chosen."""
        return self._agreement(certainty).share

    @property
    def usual_chance(self) -> float:
        """Of a token to be chosen, before it is known how sure the model is of it."""
        return self._usual.share

    def measured(self) -> tuple[float, float] | None:
        """A pass of this model, and a further row of a pass of the other one, both in passes of one row.

        None before they were timed.
        """
        one, step = self.costs.seconds(1), self._own_costs.seconds(1)
        rows = [(self.costs(n) - 1) / (n - 1) for n in range(2, LONGEST + 2) if self.costs.seconds(n)]
        return (step / one, max(0.0, median(rows))) if one and step and rows else None

    def room(self, length: int) -> int:
        """Tokens that can be foreseen after a text of so many."""
        context = self._session.context_length
        return max(0, context - length + 1) if context else LONGEST

    def fail(self, error: LosaError) -> None:
        """The session failed: the text goes on without drafts, as they are only a help."""
        self._usable = False
        self._warn(f"the model that drafts failed, and drafts no more: {error.message}")

    def follow(self, text: Sequence[int]) -> NDArray[np.float32] | None:
        """Logits [vocab] after `text`; None if the session cannot go back to where the two texts part."""
        kept = min(_shared(self._held, text), len(text) - 1)
        missing = text[kept:]
        if kept < len(missing):
            logits = self._session.prefill(text)
            self._held = list(text)
            return logits
        if kept < len(self._held) and not self._session.rewind(kept):
            self._usable = False
            return None
        del self._held[kept:]
        for start in range(0, len(missing), CHUNK):
            logits = self.append(missing[start : start + CHUNK])
        return logits

    def append(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [vocab] after what was followed last and `tokens`."""
        start = time.perf_counter()
        logits = self._session.step(tokens[0]) if len(tokens) == 1 else self._session.extend(tokens)[-1]
        self._own_costs.record(len(tokens), time.perf_counter() - start)
        self._held += tokens
        return logits

    def _agreement(self, certainty: float) -> Agreement:
        return self._agreements[bisect_right(CERTAINTIES[1:-1], certainty)]


@dataclass
class _Draft:
    """What was foreseen for a pass, as far as it was not compared yet, and what the pass has come to."""

    tokens: list[int] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    gained: int = 0
    cost: float | None = None
    """In passes of one row; None of a trial, by which nothing is judged."""


class ModelDrafter:
    """One sequence: what the draft model would say next."""

    def __init__(self, model: DraftModel, prompt: Sequence[int], vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._text = list(prompt)
        self._foreign = any(token >= vocab_size for token in prompt)
        self._draft: _Draft | None = None

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        self._text.append(token)
        self._foreign |= token >= self._vocab_size
        draft = self._draft
        if draft is None:
            return
        draft.gained += 1
        if draft.tokens:
            right = draft.tokens.pop(0) == token
            self._model.learn(draft.certainties.pop(0), right)
            if right:
                return
        if draft.cost is not None:
            self._model.settle(draft.gained, draft.cost)
        self._draft = None

    def draft(self, room: int) -> tuple[int, ...]:
        """Up to `room` tokens that are worth checking after the text."""
        self._draft = None
        room = min(room, LONGEST, self._model.room(len(self._text)))
        if room <= 0 or self._foreign or not self._model.may_draft():
            return ()
        try:
            self._draft = self._foresee(room)
        except LosaError as error:
            self._model.fail(error)
        return tuple(self._draft.tokens) if self._draft else ()

    def _foresee(self, room: int) -> _Draft | None:
        """Up to `room` tokens, as long as one more may be expected to pay; None if that cannot be known."""
        logits = self._model.follow(self._text)
        if logits is None:
            return None
        draft, passes, chance = _Draft(), 1, 1.0
        found = self._model.measured()
        step, row = found or (0.0, 0.0)
        room = room if found else min(room, TRIAL)
        while True:
            token, certainty = _most_likely(logits[: self._vocab_size])
            chance *= self._model.chance(certainty)
            if found and chance <= row:  # it is drafted already: only checking it costs
                break
            draft.tokens.append(token)
            draft.certainties.append(certainty)
            if len(draft.tokens) == room or (found and chance * self._model.usual_chance <= step + row):
                break
            logits = self._model.append((token,))
            passes += 1
        if found:
            draft.cost = self._model.costs(1 + len(draft.tokens)) + passes * step
        return draft


def require_same_vocabulary(model: Tokenizer, draft: Tokenizer) -> None:
    """Raise `InputError` unless every id stands for the same token in both."""
    ours, theirs = model.tokens, draft.tokens
    if ours == theirs:
        return
    pairs = list(zip(ours, theirs, strict=False))
    differ = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    words = [repr(tokens[differ]) if differ < len(tokens) else "none" for tokens in (ours, theirs)]
    raise InputError(
        f"{draft.folder} has another vocabulary than {model.folder}: {len(theirs)} tokens against "
        f"{len(ours)}, and token {differ} is {words[1]} there, {words[0]} here.",
        hint="Give --draft a model with the same tokenizer, e.g. a more compressed one of the same source.",
        details={"tokens": len(ours), "draft_tokens": len(theirs), "differs_at": differ},
    )


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the start that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _most_likely(logits: NDArray[np.float32]) -> tuple[int, float]:
    """The token with the largest of `logits` [vocab], and its probability."""
    best = int(logits.argmax())
    return best, float(1.0 / np.exp(logits - logits[best]).sum())
