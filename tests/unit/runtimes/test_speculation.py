"""Drafts: what is foreseen, when it is worth a pass, and that the tokens are those of a run without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.interfaces import RewindableSession
from losa_deploy.runtimes.generate import GenerateOptions, generate
from losa_deploy.runtimes.pass_costs import STALE, AssumedCosts, MeasuredCosts
from losa_deploy.runtimes.speculation import (
    Counts,
    Drafter,
    Mode,
    SpeculativeSession,
    TextDrafts,
    speculative,
    text_drafts,
)

VOCAB = 40


class Free:
    """Costs of a machine on which further rows take no time."""

    def __call__(self, rows: int) -> float:
        return 1.0

    def record(self, rows: int, seconds: float) -> None: ...


class Exact:
    """Logits are a function of the text; it refuses whatever does not go on where the text ends."""

    vocab_size = VOCAB

    def __init__(self, *, repeats: bool, context_length: int = 0, rewinds: bool = True) -> None:
        self.repeats, self.context_length, self.rewinds = repeats, context_length, rewinds
        self.held: list[int] = []
        self.passes = self.rows = self.most = 0

    def _after(self) -> NDArray[np.float32]:
        window = self.held[-1:] if self.repeats else self.held
        seed = 0
        for token in window:
            seed = (seed * 31 + token + 1) % 1000003
        return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * (6 if self.repeats else 2)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([self.prefill(tokens[: i + 1]) for i in range(len(tokens))])

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.held = list(tokens)
        return self._after()

    def step(self, token: int) -> NDArray[np.float32]:
        return self.extend((token,))[0]

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert tokens and (not self.context_length or len(self.held) + len(tokens) <= self.context_length)
        self.passes += 1
        self.rows += len(tokens)
        self.most = max(self.most, len(tokens))
        rows = []
        for token in tokens:
            self.held.append(token)
            rows.append(self._after())
        return np.stack(rows)

    def rewind(self, length: int) -> bool:
        if self.rewinds:
            assert 0 < length < len(self.held)
            del self.held[length:]
        return self.rewinds

    def close(self) -> None: ...


class Plain:
    """A session that cannot take tokens back."""

    vocab_size, context_length = VOCAB, 0

    def __init__(self) -> None:
        self._inner = Exact(repeats=True)
        self.logits, self.prefill, self.step = self._inner.logits, self._inner.prefill, self._inner.step
        self.close = self._inner.close


PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
GREEDY = GenerateOptions(max_tokens=150)
SAMPLED = GenerateOptions(max_tokens=150, temperature=0.8, top_k=20, top_p=0.95, seed=11)


@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.parametrize("context", [0, 90])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("repeats", [True, False])
@pytest.mark.parametrize("mode", ["ngram", "auto", "free"])
def test_tokens_are_those_without_drafts(
    mode: str, repeats: bool, options: GenerateOptions, context: int, rewinds: bool
) -> None:
    expected = list(generate(Exact(repeats=repeats, context_length=context), PROMPT, options))
    assert len(expected) == (80 if context else 150)
    inner, counts = Exact(repeats=repeats, context_length=context, rewinds=rewinds), Counts()
    costs = {"ngram": AssumedCosts, "auto": MeasuredCosts, "free": Free}[mode]()
    session = SpeculativeSession(inner, TextDrafts(costs), counts)
    assert list(generate(session, PROMPT, options)) == expected
    assert counts.accepted <= counts.drafted
    assert inner.rows == inner.passes + counts.drafted
    assert list(generate(session, PROMPT, options)) == expected  # a second reply starts afresh
    if mode != "auto" and repeats and rewinds and options is GREEDY and not context:
        assert inner.passes < 120 and inner.most == 8
        assert counts.accepted > 200


@pytest.mark.parametrize("repeats", [True, False])
def test_the_same_passes_in_every_run(repeats: bool) -> None:
    """In the mode `ngram`, so that logits that depend on the rows of a pass are the same too."""

    def passes() -> tuple[int, int]:
        inner = Exact(repeats=repeats)
        list(generate(speculative(inner, text_drafts("ngram"), Counts()), PROMPT, SAMPLED))
        return inner.passes, inner.rows

    assert passes() == passes()


def test_a_text_without_repetition_is_left_alone() -> None:
    inner, counts = Exact(repeats=False), Counts()
    list(generate(speculative(inner, text_drafts("ngram"), counts), PROMPT, SAMPLED))
    assert counts.drafted < 15 < inner.passes


@pytest.mark.parametrize("mode", ["off", "ngram", "auto"])
def test_who_is_sped_up(mode: Mode) -> None:
    plain, inner = Plain(), Exact(repeats=True)
    assert not isinstance(plain, RewindableSession) and isinstance(inner, RewindableSession)
    assert speculative(plain, text_drafts(mode), Counts()) is plain
    assert (speculative(inner, text_drafts(mode), Counts()) is inner) == (mode == "off")


def test_the_longest_match_goes_on_and_repeats_itself() -> None:
    drafter = Drafter((7, 1, 2, 3, 8, 8, 2, 3, 9, 9, 1, 2, 3), Free())
    assert drafter.draft(7) == (8, 8, 2, 3, 9, 9, 1)  # after 1 2 3, and not after the later 2 3
    assert drafter.draft(2) == (8,) and drafter.draft(0) == () and drafter.draft(-1) == ()
    drafter.add(8)
    assert drafter.draft(3) == (8, 2, 3)
    drafter.add(30)
    assert drafter.draft(7) == ()
    assert Drafter((4, 5, 4, 5), Free()).draft(7) == (4, 5, 4, 5, 4, 5, 4)
    assert Drafter((4,), Free()).draft(7) == () == Drafter((), Free()).draft(7)


def test_drafts_stop_when_they_fail_and_come_back_when_the_text_repeats() -> None:
    costs = AssumedCosts()
    drafter = Drafter((1, 2, 3), costs)
    random = np.random.default_rng(0)
    for _ in range(60):  # after 1 2 comes anything
        for token in (1, 2, int(random.integers(10, 10_000))):
            drafter.add(token)
    drafter.add(1)
    drafter.add(2)
    assert drafter.draft(7) == ()
    song = [int(t) for t in random.integers(10_000, 20_000, 30)]
    for token in song * 3:
        drafter.add(token)
    assert drafter.draft(7) == tuple(song[:7])


def test_measured_costs_decide_and_are_measured_again() -> None:
    costs = MeasuredCosts()
    assert costs(8) == AssumedCosts()(8)
    for _ in range(3):
        costs.record(1, 1.0)
        costs.record(8, 9.0)
    assert costs(8) == 9.0
    drafter = Drafter((4, 5) * 30, costs)
    for rows in (2, 4):
        for _ in range(3):
            costs.record(rows, 0.99 * rows + 2.0)
    assert drafter.draft(7) == ()  # a pass of 8 rows takes as long as 9 of one
    costs.record(8, 500.0)
    assert costs(8) == 9.0  # one pass that was held up says nothing
    for _ in range(STALE + 1):
        costs.record(1, 1.0)
    assert costs(8) == AssumedCosts()(8)
