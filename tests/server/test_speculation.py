"""Drafts in the server: replies, ends, log-probabilities and counts are those without drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.errors import LosaError
from losa_deploy.runtimes.draft_model import DraftModel
from losa_deploy.runtimes.generate import GenerateOptions
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime
from losa_deploy.runtimes.ort.session import OrtRuntime
from losa_deploy.runtimes.server.engine import EngineFailure, EngineRequest, EngineToken, FinishReason
from losa_deploy.runtimes.server.sequential import QueueEngine
from losa_deploy.runtimes.server.slots import Row, SlotEngine
from losa_deploy.runtimes.speculation import Drafts, Mode, text_drafts

from .conftest import Running, running

VOCAB = 60
PROMPT = (3, 1, 4, 1, 5)


class Cyclic:
    """Logits depend on the last token, so that replies repeat themselves; every row is checked."""

    vocab_size = VOCAB
    context_length = 200

    def __init__(self, slots: int, *, cuts: bool = True) -> None:
        self.slots, self.batch, self.cuts = slots, 32, cuts
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.passes: list[list[Row]] = []
        self.fail_at = -1

    def decode(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        assert 0 < len(rows) <= self.batch
        self.passes.append(list(rows))
        if len(self.passes) == self.fail_at:
            raise LosaError("out of order", hint="")
        found = []
        for row in rows:
            assert row.position == len(self.held[row.slot]) < self.context_length
            self.held[row.slot].append(row.token)
            if row.wanted:
                found.append(logits_after(row.token))
        return found

    def cut(self, slot: int, length: int) -> int:
        length = length if self.cuts else 0
        del self.held[slot][length:]
        return length

    def close(self) -> None: ...


def logits_after(token: int) -> NDArray[np.float32]:
    return np.random.default_rng(token).normal(size=VOCAB).astype(np.float32) * 4


Reply = tuple[list[EngineToken], FinishReason | None]


async def _replies(engine: SlotEngine, requests: Sequence[EngineRequest]) -> list[Reply]:
    async def read(request: EngineRequest) -> Reply:
        (ticket,) = engine.submit([request])
        return [token async for token in ticket], ticket.finish

    return await asyncio.gather(*(read(request) for request in requests))


def replies(
    session: Cyclic, drafts: Drafts | None, requests: Sequence[EngineRequest]
) -> tuple[list[Reply], SlotEngine]:
    engine = SlotEngine("cyclic", session, queue=10, log=lambda text: None, drafts=drafts)
    try:
        return asyncio.run(_replies(engine, requests)), engine
    finally:
        engine.close()


def requests() -> list[EngineRequest]:
    """Greedy and sampled; to the limit, the end of the context, a stop token; some with log-probabilities."""
    greedy = GenerateOptions(max_tokens=100)
    sampled = GenerateOptions(max_tokens=70, temperature=0.7, top_p=0.9, seed=5)
    stop = int(logits_after(int(logits_after(PROMPT[-1]).argmax())).argmax())
    return [
        EngineRequest(PROMPT, greedy, top_logprobs=3),
        EngineRequest((*PROMPT, *range(40)), sampled, top_logprobs=0),
        EngineRequest(PROMPT, GenerateOptions(max_tokens=500)),
        EngineRequest(PROMPT, GenerateOptions(max_tokens=100, stop_ids=(stop,))),
        EngineRequest(PROMPT, GenerateOptions(max_tokens=0)),
    ]


@pytest.mark.parametrize("mode", ["ngram", "auto"])
@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_replies_are_those_without_drafts(slots: int, cuts: bool, mode: Mode) -> None:
    plain, _ = replies(Cyclic(slots), None, requests())
    assert [finish for _, finish in plain] == ["length", "length", "length", "stop", "length"]
    assert len(plain[2][0]) == Cyclic.context_length - len(PROMPT) + 1
    session = Cyclic(slots, cuts=cuts)
    found, engine = replies(session, text_drafts(mode), requests())
    assert found == plain
    stats = engine.stats()
    assert stats.generated_tokens == sum(len(tokens) for tokens, _ in plain)
    assert stats.active == 0 and stats.accepted_tokens <= stats.drafted_tokens
    if mode == "ngram" and cuts:
        assert stats.accepted_tokens > 50
        assert max(len(rows) for rows in session.passes if all(row.wanted for row in rows)) == 8


def test_a_slot_is_reused_after_a_draft_that_went_too_far() -> None:
    """What was drafted beyond the end of a reply is not held against the next prompt."""
    first = EngineRequest((*range(50), 7), GenerateOptions(max_tokens=61))
    plain, _ = replies(Cyclic(1), None, [first])
    longer = EngineRequest((*first.prompt, *(t.id for t in plain[0][0]), 9), GenerateOptions(max_tokens=5))
    expected, _ = replies(Cyclic(1), None, [longer])
    session = Cyclic(1)
    engine = SlotEngine("cyclic", session, queue=10, log=lambda text: None, drafts=text_drafts("ngram"))
    try:
        assert asyncio.run(_replies(engine, [first])) == plain
        assert asyncio.run(_replies(engine, [longer])) == expected
        assert engine.stats().accepted_tokens > 0
        assert engine.stats().cached_tokens == len(longer.prompt) - 2  # the last token was never appended
    finally:
        engine.close()


def test_a_pass_with_a_draft_that_fails_ends_its_request_only() -> None:
    session = Cyclic(2)
    request = EngineRequest(PROMPT, GenerateOptions(max_tokens=100))
    expected, _ = replies(Cyclic(2), None, [request])
    replies(session, text_drafts("ngram"), [request])
    drafted = next(i for i, rows in enumerate(session.passes) if len(rows) == 8 and rows[-1].wanted)
    failing = Cyclic(2)
    failing.fail_at = drafted + 1
    engine = SlotEngine("cyclic", failing, queue=10, log=lambda text: None, drafts=text_drafts("ngram"))
    try:
        with pytest.raises(EngineFailure):
            asyncio.run(_replies(engine, [request]))
        assert asyncio.run(_replies(engine, [request])) == expected
    finally:
        engine.close()


class Second:
    """A session that says what `Cyclic` says, but for one token in four."""

    vocab_size = VOCAB
    context_length = 0

    def __init__(self) -> None:
        self.held: list[int] = []
        self.closed = False

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([self._after(token) for token in tokens])

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.held = list(tokens)
        return self._after(tokens[-1])

    def step(self, token: int) -> NDArray[np.float32]:
        return self.extend((token,))[0]

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.held += tokens
        return self.logits(tokens)

    def rewind(self, length: int) -> bool:
        del self.held[length:]
        return True

    def close(self) -> None:
        self.closed = True

    @staticmethod
    def _after(token: int) -> NDArray[np.float32]:
        logits = logits_after(token)
        return np.roll(logits, 1) if token % 4 == 0 else logits


class Told:
    """Costs that are known: a further row takes a twentieth of a pass, as does a pass of a second model."""

    def __call__(self, rows: int) -> float:
        return 0.95 + 0.05 * rows

    def seconds(self, rows: int) -> float | None:
        return self(rows)

    def record(self, rows: int, seconds: float) -> None: ...


class Cheap(Told):
    def __call__(self, rows: int) -> float:
        return 0.05


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("slots", [1, 3])
def test_replies_are_those_without_a_second_model(slots: int, cuts: bool) -> None:
    plain, _ = replies(Cyclic(slots), None, requests())
    second = Second()
    drafts = DraftModel(second, costs=Told(), own_costs=Cheap())
    found, engine = replies(Cyclic(slots, cuts=cuts), drafts, requests())
    assert found == plain
    assert second.closed
    stats = engine.stats()
    assert stats.accepted_tokens <= stats.drafted_tokens
    if cuts:
        assert stats.accepted_tokens > 50


@pytest.fixture(scope="module", params=["ort", "llamacpp"])
def servers(
    request: pytest.FixtureRequest, tiny_llama: Path, tiny_dense_onnx: Path, gguf_models: dict[bool, Path]
) -> Iterator[dict[Mode, Running]]:
    """The tiny model without drafts and with them."""

    def engine(mode: Mode) -> QueueEngine | SlotEngine:
        if request.param == "ort":
            session = OrtRuntime().open(tiny_dense_onnx, threads=1)
            return QueueEngine("ort", session, queue=8, context=0, log=print, drafts=text_drafts(mode))
        slots = LlamaCppRuntime().open_slots(gguf_models[True], threads=1, slots=2, context=0)
        return SlotEngine("llamacpp", slots, queue=8, log=print, drafts=text_drafts(mode))

    with running(engine("off"), tiny_llama) as off, running(engine("ngram"), tiny_llama) as ngram:
        yield {"off": off, "ngram": ngram}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 90, "temperature": 0},
        {"max_tokens": 90, "temperature": 1, "seed": 3},
        {"max_tokens": 90, "temperature": 0, "stop": [". "]},
        {"max_tokens": 30, "temperature": 0, "logprobs": 3},
        {"max_tokens": 7, "temperature": 0.5, "seed": 1, "logprobs": 2},
    ],
)
def test_answers_are_the_same_over_http(servers: dict[Mode, Running], fields: dict[str, object]) -> None:
    prompt = "Anna has 2 red apples. Ben has 3 green doors. Carla has 4 blue goats. " * 2 + "Anna has"
    answers = [
        server.client().completions.create(model="tiny", prompt=prompt, **fields).choices[0]  # type: ignore[call-overload]
        for server in servers.values()
    ]
    off, ngram = answers
    assert (ngram.text, ngram.finish_reason) == (off.text, off.finish_reason)
    if "stop" in fields:
        assert off.finish_reason == "stop" and ". " not in off.text
    if "logprobs" in fields:
        assert ngram.logprobs.tokens == off.logprobs.tokens
        np.testing.assert_allclose(ngram.logprobs.token_logprobs, off.logprobs.token_logprobs, atol=1e-3)


def test_what_is_drafted_is_counted(servers: dict[Mode, Running]) -> None:
    for mode, server in servers.items():
        body = {"model": "tiny", "prompt": "Anna has 2 red " * 8, "max_tokens": 60, "temperature": 0}
        assert server.ask("POST", "/v1/completions", body).status == 200
        drafted, accepted = (server.metric(f"losa_{name}_tokens_total") for name in ("drafted", "accepted"))
        assert (drafted >= accepted > 0) == (mode == "ngram")
