"""A second model drafts: the tokens are those without it, it follows every text, and rests where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.errors import InputError, LosaError
from losa_deploy.runtimes.draft_model import CHUNK, FIRST_REST, LONGEST, DraftModel, require_same_vocabulary
from losa_deploy.runtimes.generate import GenerateOptions, generate
from losa_deploy.runtimes.pass_costs import ENOUGH
from losa_deploy.runtimes.speculation import Counts, SpeculativeSession, speculative
from losa_deploy.text.tokenizer import load_tokenizer

from .test_speculation import GREEDY, PROMPT, SAMPLED, VOCAB, Exact, Plain


class Known:
    """Costs of a machine that was measured before."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._seconds = seconds

    def __call__(self, rows: int) -> float:
        return self._seconds[rows] / self._seconds[1]

    def seconds(self, rows: int) -> float | None:
        return self._seconds.get(rows)

    def record(self, rows: int, seconds: float) -> None: ...


class Similar(Exact):
    """Says what `Exact` says, but for one text in `wrong_in` (0: never wrong, 1: always)."""

    def __init__(self, wrong_in: int, *, context_length: int = 0, rewinds: bool = True) -> None:
        super().__init__(repeats=True, context_length=context_length, rewinds=rewinds)
        self.wrong_in = wrong_in

    def _after(self) -> NDArray[np.float32]:
        logits = super()._after()
        return np.roll(logits, 1) if self.wrong_in and sum(self.held) % self.wrong_in == 0 else logits


ROWS = {rows: 1.0 + 0.1 * (rows - 1) for rows in range(1, LONGEST + 2)}


def drafts(session: Exact, step: float = 0.2) -> DraftModel:
    """A draft model on a machine where a further row costs a tenth of a pass, and its own passes `step`."""
    return DraftModel(session, costs=Known(ROWS), own_costs=Known({1: step}))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rewinds", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("context", [0, 90])
@pytest.mark.parametrize("wrong_in", [0, 3, 1])
def test_tokens_are_those_without_drafts(
    wrong_in: int, context: int, rewinds: tuple[bool, bool], options: GenerateOptions
) -> None:
    expected = list(generate(Exact(repeats=True, context_length=context), PROMPT, options))
    inner = Exact(repeats=True, context_length=context, rewinds=rewinds[0])
    second, counts = Similar(wrong_in, rewinds=rewinds[1]), Counts()
    session = SpeculativeSession(inner, drafts(second), counts)
    assert list(generate(session, PROMPT, options)) == expected
    assert counts.accepted <= counts.drafted
    assert inner.rows == inner.passes + counts.drafted
    if options is GREEDY and wrong_in == 0:
        # Whatever was drafted is right, which it can only be if the second model has the same text.
        assert counts.accepted > 0.8 * len(expected)
        assert counts.drafted - counts.accepted <= LONGEST
        assert inner.passes < 0.3 * len(expected)
    if wrong_in == 3 and all(rewinds):
        assert 0 < counts.accepted < counts.drafted
        assert inner.passes < len(expected)
    assert list(generate(session, PROMPT, options)) == expected  # a second reply starts afresh


def test_drafts_that_are_never_chosen_end_and_are_tried_again_rarely() -> None:
    inner, second, counts = Exact(repeats=True), Similar(1), Counts()
    options = GenerateOptions(max_tokens=600)
    list(generate(SpeculativeSession(inner, drafts(second), counts), PROMPT, options))
    assert counts.accepted == 0
    assert 0 < counts.drafted < 60
    assert second.passes < 120 < inner.passes


@pytest.mark.parametrize("step", [0.95, 3.0])
def test_a_draft_model_that_is_too_slow_is_left_alone(step: float) -> None:
    inner, second, counts = Exact(repeats=True), Similar(0), Counts()
    options = GenerateOptions(max_tokens=300)
    list(generate(SpeculativeSession(inner, drafts(second, step), counts), PROMPT, options))
    assert counts.drafted < 60 and second.passes < 60  # of 300; what it has foreseen is worth a row


def test_it_comes_back_after_a_rest() -> None:
    """A text on which it fails, and then one on which it does not."""
    second = Similar(1)
    model = drafts(second)
    drafter = model.begin(PROMPT, VOCAB)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 30)]
    tried = [bool(feed(drafter, token)) for token in tokens]
    assert any(tried[:10]) and not any(tried[12:])
    second.wrong_in = 0
    target, counts = Exact(repeats=True), Counts()
    list(generate(SpeculativeSession(target, model, counts), PROMPT, GenerateOptions(max_tokens=400)))
    assert counts.accepted > 200 > target.passes - FIRST_REST * 2


def feed(drafter: object, token: int) -> tuple[int, ...]:
    """A pass of the model that checks: what was drafted for it, after `token` was chosen."""
    from losa_deploy.runtimes.draft_model import ModelDrafter

    assert isinstance(drafter, ModelDrafter)
    drafter.add(token)
    return drafter.draft(LONGEST)


def test_nothing_is_drafted_before_passes_without_drafts_were_timed() -> None:
    second, counts = Similar(0), Counts()
    inner = Exact(repeats=True)
    session = SpeculativeSession(inner, DraftModel(second), counts)
    session.prefill(PROMPT)
    for token in range(ENOUGH):
        session.step(token)
    assert (counts.drafted, second.passes) == (0, 0)
    session.step(5)
    assert second.held[: len(PROMPT) + ENOUGH + 1] == [*PROMPT, *range(ENOUGH), 5]


class Sure(Similar):
    """It has no doubt."""

    def _after(self) -> NDArray[np.float32]:
        return 100 * super()._after()


def test_no_draft_beyond_the_context_or_the_vocabulary_of_the_draft_model() -> None:
    drafter = drafts(Sure(0, context_length=len(PROMPT) + 2)).begin(PROMPT, VOCAB)
    found = [drafter.draft(LONGEST)]
    while found[-1]:
        found.append(feed(drafter, found[-1][0]))
    assert [len(tokens) for tokens in found] == [3, 2, 1, 0]  # the last one is foreseen, and not appended
    assert found[1] == found[0][1:] and found[2] == found[1][1:]
    assert [len(drafts(Sure(0)).begin(PROMPT, VOCAB).draft(room)) for room in (9, 2, 0)] == [LONGEST, 2, 0]
    narrow = drafts(Sure(0)).begin(PROMPT, max(PROMPT) + 1)
    assert 0 < max(narrow.draft(LONGEST)) <= max(PROMPT)
    assert feed(narrow, max(PROMPT) + 1) == () == feed(narrow, 1)


class Noted(Exact):
    """Notes in how many tokens it was given what it holds."""

    def __init__(self) -> None:
        super().__init__(repeats=True)
        self.given: list[int] = []

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.given.append(-len(tokens))
        return super().prefill(tokens)

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.given.append(len(tokens))
        return super().extend(tokens)


def test_another_text_is_followed_from_where_the_two_part() -> None:
    session = Noted()
    model = DraftModel(session)
    first = [*range(30)] * 4

    def check(text: Sequence[int]) -> list[int]:
        session.given.clear()
        logits = model.follow(text)
        assert session.held == list(text)
        assert logits is not None and np.array_equal(logits, Exact(repeats=True).prefill(text))
        return session.given

    assert check(first) == [-120]
    assert check([*first, 7]) == [1]
    assert check([*first[:100], 8, 9]) == [2]
    assert check([*first[:100], 8, 9]) == [1]  # the logits of the last token are wanted again
    assert check([*first[:100], *range(60)]) == [CHUNK, 60 - CHUNK]
    assert check([5, *first]) == [-121]
    assert check([5]) == [-1]


def test_a_session_that_takes_nothing_back_drafts_for_nobody() -> None:
    class Closing(Similar):
        closed = False

        def close(self) -> None:
            self.closed = True

    second, plain = Closing(0), Plain()
    assert speculative(plain, drafts(second), Counts()) is plain
    assert second.closed


def test_a_draft_model_that_fails_ends_the_drafts_and_not_the_text() -> None:
    class Failing(Similar):
        def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            if self.passes == 10:
                raise LosaError("no memory", hint="Buy some.")
            return super().extend(tokens)

    expected = list(generate(Exact(repeats=True), PROMPT, GREEDY))
    second, counts, told = Failing(0), Counts(), list[str]()
    model = DraftModel(second, costs=Known(ROWS), own_costs=Known({1: 0.2}), warn=told.append)
    session = SpeculativeSession(Exact(repeats=True), model, counts)
    assert [list(generate(session, PROMPT, GREEDY)) for _ in range(2)] == [expected] * 2
    assert told == ["the model that drafts failed, and drafts no more: no memory"]
    assert second.passes == 10 and counts.accepted > 0


def test_vocabularies_are_compared_token_by_token(tiny_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    model = load_tokenizer(tiny_tokenizer)
    require_same_vocabulary(model, load_tokenizer(tiny_tokenizer))
    longer, swapped = tmp_path / "longer", tmp_path / "swapped"
    other = PreTrainedTokenizerFast.from_pretrained(str(tiny_tokenizer))
    other.add_tokens(["zebra"])
    other.save_pretrained(str(longer))
    with pytest.raises(InputError, match=r"301 tokens against 300, and token 300 is .zebra. there, none"):
        require_same_vocabulary(model, load_tokenizer(longer))
    swapped.mkdir()
    for path in tiny_tokenizer.iterdir():
        (swapped / path.name).write_bytes(path.read_bytes())
    file = swapped / "tokenizer.json"
    file.write_text(file.read_text("utf-8").replace("<|user|>", "<|you|>"), "utf-8")
    with pytest.raises(InputError, match=r"token 3 is '<\|you\|>' there, '<\|user\|>' here"):
        require_same_vocabulary(model, load_tokenizer(swapped))
