"""The scheduler over a made-up batch session that checks every row, then over llama.cpp."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.runtimes.generate import GenerateOptions
from losa_deploy.runtimes.server.engine import EngineFailure, EngineRequest
from losa_deploy.runtimes.server.slots import CHUNK_BESIDE, Row, SlotEngine

from .conftest import until

VOCAB = 97


class Checked:
    """The next token is a hash of all tokens of the slot, so that a wrong sequence shows in the reply."""

    vocab_size = VOCAB
    context_length = 400

    def __init__(self, slots: int, batch: int) -> None:
        self.slots, self.batch = slots, batch
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.passes: list[list[Row]] = []
        self.begun = 0
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.poison = -1
        self.closed = False
        self.keeps = True

    def decode(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        assert 0 < len(rows) <= self.batch
        self.begun += 1
        self.gate.wait(60)
        if self.fail:
            raise RuntimeError("out of order")
        self.passes.append(list(rows))
        found = []
        for row in rows:
            assert row.position == len(self.held[row.slot])
            if row.token == self.poison:
                self.held[row.slot].append(-1)  # whatever it has done until here
                raise RuntimeError("poisoned")
            self.held[row.slot].append(row.token)
            if row.wanted:
                found.append(logits_after(self.held[row.slot]))
        return found

    def cut(self, slot: int, length: int) -> int:
        length = length if self.keeps else 0
        del self.held[slot][length:]
        return length

    def close(self) -> None:
        self.closed = True


def logits_after(tokens: Sequence[int]) -> NDArray[np.float32]:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1000003
    return np.random.default_rng(value).normal(size=VOCAB).astype(np.float32)


def alone(prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def prompts(count: int, longest: int = 90) -> list[tuple[int, ...]]:
    random = np.random.default_rng(3)
    return [
        tuple(int(t) for t in random.integers(VOCAB, size=random.integers(1, longest))) for _ in range(count)
    ]


def request(prompt: Sequence[int], count: int) -> EngineRequest:
    return EngineRequest(tuple(prompt), GenerateOptions(max_tokens=count))


async def replies(engine: SlotEngine, requests: Sequence[EngineRequest]) -> list[list[int]]:
    async def read(asked: EngineRequest) -> list[int]:
        (ticket,) = engine.submit([asked])
        return [token.id async for token in ticket]

    return await asyncio.gather(*(read(r) for r in requests))


Make = Callable[..., tuple[SlotEngine, Checked, list[str]]]


@pytest.fixture
def make() -> Iterator[Make]:
    engines: list[tuple[SlotEngine, Checked]] = []

    def build(slots: int = 3, batch: int = 40, queue: int = 50) -> tuple[SlotEngine, Checked, list[str]]:
        session, log = Checked(slots, batch), list[str]()
        engine = SlotEngine("checked", session, queue=queue, log=log.append)
        engines.append((engine, session))
        return engine, session, log

    yield build
    for engine, session in engines:
        session.gate.set()
        engine.close()
        assert session.closed


@pytest.mark.parametrize(("slots", "batch"), [(1, 7), (3, 40), (5, 8), (4, 512)])
def test_every_reply_is_what_it_is_alone(make: Make, slots: int, batch: int) -> None:
    engine, session, log = make(slots, batch)
    asked = [(p, 1 + i % 9) for i, p in enumerate(prompts(12))]
    found = asyncio.run(replies(engine, [request(p, n) for p, n in asked]))
    assert found == [alone(p, n) for p, n in asked]
    assert log == []
    if slots > 1:
        assert any(len({row.slot for row in rows}) > 1 for rows in session.passes)
    assert engine.stats().active == 0
    assert engine.stats().generated_tokens == sum(n for _, n in asked)


def test_a_long_prompt_does_not_hold_up_replies(make: Make) -> None:
    engine, session, _ = make(2, 512)

    async def scene() -> None:
        session.gate.clear()  # else a busy machine might end the first reply before the second request
        (first,) = engine.submit([request((1, 2, 3), 200)])
        await asyncio.to_thread(until, lambda: session.begun == 1)
        (second,) = engine.submit([request(prompts(1, 92)[0] * 4, 2)])
        session.gate.set()
        async for _ in second:
            pass
        first.cancel()

    asyncio.run(scene())
    mixed = [rows for rows in session.passes if len({row.slot for row in rows}) == 2]
    assert mixed
    assert all(len(rows) <= 1 + CHUNK_BESIDE for rows in mixed)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_continued_conversation_is_not_computed_again(make: Make, keeps: bool) -> None:
    engine, session, _ = make(2, 512)
    session.keeps = keeps
    start = tuple(range(60))
    reply = alone(start, 5)
    longer = (*start, *reply, 9, 8, 7)
    assert asyncio.run(replies(engine, [request(start, 5)])) == [reply]
    before = sum(len(rows) for rows in session.passes)
    assert asyncio.run(replies(engine, [request(longer, 4)])) == [alone(longer, 4)]
    cached = engine.stats().cached_tokens
    assert cached == (len(start) + 4 if keeps else 0)  # the last token of the reply was never appended
    assert sum(len(rows) for rows in session.passes) - before == len(longer) - cached + 3
    assert asyncio.run(replies(engine, [request(start, 5)])) == [reply]


def test_a_failure_ends_what_runs_and_nothing_else(make: Make) -> None:
    engine, session, log = make(2)
    session.fail = True
    with pytest.raises(EngineFailure):
        asyncio.run(replies(engine, [request((5, 6), 3)]))
    assert "out of order" in log[0]
    session.fail = False
    assert asyncio.run(replies(engine, [request((5, 6), 3)])) == [alone((5, 6), 3)]


@pytest.mark.parametrize("at", [3, 60])
def test_a_request_that_fails_does_not_end_the_others(make: Make, at: int) -> None:
    """Token 96 breaks any pass it is in; the others are computed anew, in the middle of their replies too."""
    engine, session, log = make(4, 64)
    session.poison = VOCAB - 1
    sound = [p for p in prompts(9) if VOCAB - 1 not in p and VOCAB - 1 not in alone(p, 8)][:5]
    bad = (*(i % 50 for i in range(at)), VOCAB - 1, 4)

    async def scene() -> list[list[int] | BaseException]:
        asked = [request(p, 8) for p in (*sound[:2], bad, *sound[2:])]
        found = await asyncio.gather(*(replies(engine, [a]) for a in asked), return_exceptions=True)
        return [f if isinstance(f, BaseException) else f[0] for f in found]

    found = asyncio.run(scene())
    assert isinstance(found.pop(2), EngineFailure)
    assert found == [alone(p, 8) for p in sound]
    assert any("poisoned" in line for line in log)
    assert asyncio.run(replies(engine, [request(sound[0], 3)])) == [alone(sound[0], 3)]


def test_cancelled_requests_free_their_slots(make: Make) -> None:
    engine, session, _ = make(2, 40)

    async def scene() -> None:
        session.gate.clear()
        tickets = engine.submit([request((i,), 300) for i in range(4)])
        await asyncio.to_thread(until, lambda: engine.stats().waiting == 2)
        for ticket in tickets:
            ticket.cancel()
        assert engine.stats().waiting == 0
        session.gate.set()
        await asyncio.to_thread(until, lambda: engine.stats().active == 0)

    asyncio.run(scene())
    assert engine.stats().generated_tokens < 20
    assert asyncio.run(replies(engine, [request((5, 6), 3)])) == [alone((5, 6), 3)]


@pytest.mark.parametrize("packed", [False, True])
def test_llamacpp_answers_together_as_alone(
    gguf_models: dict[bool, Path], tiny_llama: Path, packed: bool
) -> None:
    from losa_deploy.runtimes.generate import generate
    from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime
    from losa_deploy.text.tokenizer import load_tokenizer

    folder = gguf_models[packed]
    tokenizer = load_tokenizer(folder)
    names = (
        "Anna has",
        "Ben has 3",
        "Carla has 4 blue",
        "Dora has 5 white",
        "Emil",
        "Fred has 7 brown apples.",
    )
    asked = [tuple(tokenizer.encode(name)) for name in names]
    session = LlamaCppRuntime().open(folder, threads=1)
    one_by_one = [list(generate(session, p, GenerateOptions(max_tokens=12))) for p in asked]
    session.close()
    slots = LlamaCppRuntime().open_slots(folder, threads=1, slots=3, context=0)
    engine = SlotEngine("llamacpp", slots, queue=10, log=lambda text: None)
    try:
        assert engine.context_length == 256
        assert asyncio.run(replies(engine, [request(p, 12) for p in asked])) == one_by_one
        assert asyncio.run(replies(engine, [request(asked[1], 12)])) == [one_by_one[1]]
    finally:
        engine.close()
