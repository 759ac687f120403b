"""Long prompts: refused before the work where they cannot fit, else tokenized beside the event loop."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from losa_deploy.runtimes.server.bounds import SHRINK, UNBOUNDED, longest_token, text_bound
from losa_deploy.runtimes.server.sequential import QueueEngine
from losa_deploy.runtimes.server.workers import LARGE
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer

from .conftest import Answer, Running, running, until
from .fakes import LONG, CountingSession, HeldTokenizer

CONTEXT = 1 << 16
EXTRA = "<extra_0>"
PROMPT = "word " * (LONG // 4)


def ask(server: Running, kind: str, content: object, timeout: float = 30) -> Answer:
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}),
        "text": ("/v1/completions", {"prompt": content}),
    }[kind]
    return server.ask("POST", path, {"model": "tiny", "max_tokens": 2, **body}, timeout=timeout)


def server_of(
    folder: Path, tokenizer: Tokenizer, *, queue: int = 8, context: int = CONTEXT
) -> Iterator[Running]:
    session = CountingSession()
    session.context_length = context
    engine = QueueEngine("fake", session, queue=queue, context=0, log=lambda text: None)
    with running(engine, folder, tokenizer=tokenizer) as server:
        yield server
        if isinstance(tokenizer, HeldTokenizer):
            tokenizer.gate.set()


@pytest.fixture
def held(tiny_llama: Path) -> HeldTokenizer:
    return HeldTokenizer(load_tokenizer(tiny_llama))


@pytest.fixture
def server(tiny_llama: Path, held: HeldTokenizer) -> Iterator[Running]:
    yield from server_of(tiny_llama, held)


@pytest.fixture
def crowded(tiny_llama: Path, held: HeldTokenizer) -> Iterator[Running]:
    """One runs, one waits."""
    yield from server_of(tiny_llama, held, queue=1)


def in_threads(
    server: Running, kinds: Sequence[tuple[str, str]]
) -> tuple[list[threading.Thread], list[Answer]]:
    answers: list[Answer] = []

    def one(kind: str, content: str) -> None:
        answers.append(ask(server, kind, content))

    threads = [threading.Thread(target=one, args=each, daemon=True) for each in kinds]
    for thread in threads:
        thread.start()
    return threads, answers


@pytest.mark.parametrize(("kind", "field"), [("chat", "messages"), ("text", "prompt")])
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    server: Running, held: HeldTokenizer, kind: str, field: str
) -> None:
    most = text_bound(held, CONTEXT)
    answer = ask(server, kind, "x" * (most + 1))
    assert answer.status == 400
    assert (answer.error["code"], answer.error["param"]) == ("context_length_exceeded", field)
    assert f"{most} bytes" in answer.error["message"]
    assert ask(server, kind, "é" * (most // 2 + 1)).error["code"] == "context_length_exceeded"
    assert held.texts == 0


def test_the_bound_is_over_all_messages(server: Running, held: HeldTokenizer) -> None:
    part = {"role": "user", "content": "x" * (text_bound(held, CONTEXT) // 2 + 1)}
    body = {"model": "tiny", "messages": [part, {**part, "role": "assistant"}]}
    answer = server.ask("POST", "/v1/chat/completions", body)
    assert answer.error["code"] == "context_length_exceeded"
    assert held.texts == 0


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_others_are_answered_while_a_long_text_is_tokenized(
    server: Running, held: HeldTokenizer, kind: str
) -> None:
    threads, answers = in_threads(server, [(kind, PROMPT)])
    until(lambda: held.running == 1)
    assert json.loads(server.ask("GET", "/health", timeout=10).text)["status"] == "ok"
    assert ask(server, "text", "Hi", timeout=10).status == 200
    assert not answers
    held.gate.set()
    threads[0].join(20)
    assert answers[0].status == 200


def test_a_large_text_does_not_hold_up_those_of_middle_size(server: Running, held: HeldTokenizer) -> None:
    threads, answers = in_threads(server, [("text", "x" * LARGE)] * 3)
    until(lambda: held.running == 1)
    more, _ = in_threads(server, [("text", PROMPT)] * 4)
    until(lambda: held.running == 3)
    held.gate.set()
    for thread in threads + more:
        thread.join(20)
    assert held.most == 3  # one large, two of middle size
    assert held.texts == 7
    assert [a.status for a in answers] == [400] * 3  # so many tokens do not fit


def test_texts_that_wait_for_a_thread_are_bounded(crowded: Running, held: HeldTokenizer) -> None:
    threads, answers = in_threads(crowded, [("text", PROMPT)] * 2)
    until(lambda: held.running == 2)
    refused = ask(crowded, "text", PROMPT)
    assert refused.status == 503
    assert refused.error["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert ask(crowded, "text", "Hi").status == 200
    held.gate.set()
    for thread in threads:
        thread.join(20)
    assert [a.status for a in answers] == [200, 200]


def test_a_client_that_leaves_before_its_text_is_tokenized(crowded: Running, held: HeldTokenizer) -> None:
    name = 'losa_requests_total{endpoint="/v1/completions",outcome="cancelled"}'
    for count in (1, 2, 3):  # more than there is room for
        with pytest.raises(TimeoutError):
            ask(crowded, "text", PROMPT, timeout=0.5)
        until(lambda count=count: crowded.metric(name) == count)  # type: ignore[misc]
    assert held.texts == 2  # the third waited for a thread, and was dropped
    held.gate.set()
    assert ask(crowded, "text", PROMPT).status == 200
    assert held.texts == 3


@pytest.mark.parametrize(("gguf", "sentences"), [(False, 40_000), (True, 100_000)])
def test_real_tokenizers_leave_the_event_loop_free(
    tiny_llama: Path, gguf_models: dict[bool, Path], gguf: bool, sentences: int
) -> None:
    tokenizer = load_tokenizer(gguf_models[False] if gguf else tiny_llama)
    prompt = "Anna has 2 red apples. " * sentences
    for server in server_of(tiny_llama, tokenizer):
        start = time.monotonic()
        threads, answers = in_threads(server, [("text", prompt)])
        waits: list[float] = []
        while not answers:
            before = time.monotonic()
            assert server.ask("GET", "/health").status == 200
            waits.append(time.monotonic() - before)
            time.sleep(0.02)
        took = time.monotonic() - start
        threads[0].join(20)
        assert "the request needs more" in answers[0].error["message"]
        assert max(waits) < took / 3


def test_no_text_that_fits_is_over_the_bound(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    longest = longest_token(tokenizer)
    tokens = [tokenizer.decode([i], special=True) for i in range(tokenizer.size)]
    assert longest == 1 + max(len(t.encode()) for t in tokens)
    text = max(tokens, key=len) * 40
    assert len(text.encode()) <= longest * len(tokenizer.encode(text))
    assert text_bound(tokenizer, 100) == 100 * longest * SHRINK
    assert text_bound(tokenizer, 0) == UNBOUNDED


def test_an_unknown_context_has_a_bound(tiny_llama: Path, held: HeldTokenizer) -> None:
    for server in server_of(tiny_llama, held, context=0):
        answer = ask(server, "text", "x" * (UNBOUNDED + 1))
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert held.texts == 0
        held.gate.set()
        assert ask(server, "text", "x" * UNBOUNDED).status == 200


def test_words_of_any_length_that_are_one_token_are_not_held_against_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Inner(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(str(tmp_path))  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("x" * 100_000)) == 1
    assert text_bound(tokenizer, 16) == UNBOUNDED


@pytest.mark.parametrize(("kind", "field"), [("chat", "messages"), ("text", "prompt")])
def test_a_text_with_a_token_beyond_the_models_rows(
    tiny_llama: Path, tmp_path: Path, kind: str, field: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    inner = PreTrainedTokenizerFast.from_pretrained(str(tiny_llama))
    inner.add_special_tokens({"additional_special_tokens": [EXTRA]})  # type: ignore[dict-item]
    inner.save_pretrained(str(tmp_path))
    for server in server_of(tiny_llama, load_tokenizer(tmp_path)):
        answer = ask(server, kind, f"x {EXTRA}")
        assert answer.status == 400
        assert (answer.error["param"], answer.error["code"]) == (field, "invalid_value")
        assert EXTRA in answer.error["message"]
        assert "300" in answer.error["message"]
        assert ask(server, kind, "x").status == 200
