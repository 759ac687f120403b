"""What is refused, in OpenAI's form, with the field named; keys, limits, failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from losa_deploy.runtimes.server.sequential import QueueEngine

from .conftest import Answer, Running, running, until
from .fakes import CountingSession

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
TEXT = {"model": "tiny", "prompt": "Hi", "max_tokens": 4}
ENDPOINTS = {"chat": ("/v1/chat/completions", CHAT), "text": ("/v1/completions", TEXT)}


def post(server: Running, kind: str, **fields: object) -> Answer:
    path, body = ENDPOINTS[kind]
    return server.ask("POST", path, {**body, **fields})


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"n": 2}, "n"),
        ("chat", {"frequency_penalty": 0.5}, "frequency_penalty"),
        ("chat", {"presence_penalty": -1}, "presence_penalty"),
        ("chat", {"logit_bias": {"5": 10}}, "logit_bias"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"functions": [{"name": "f"}]}, "functions"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"modalities": ["audio"]}, "modalities"),
        ("chat", {"audio": {"voice": "x"}}, "audio"),
        ("chat", {"prediction": {"type": "content"}}, "prediction"),
        ("chat", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat", {"verbosity": "high"}, "verbosity"),
        ("chat", {"service_tier": "priority"}, "service_tier"),
        ("chat", {"store": True}, "store"),
        ("chat", {"web_search_options": {"a": 1}}, "web_search_options"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"temperature": 3}, "temperature"),
        ("chat", {"temperature": "hot"}, "temperature"),
        ("chat", {"top_p": 1.5}, "top_p"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"max_completion_tokens": 4}, "max_tokens"),
        ("chat", {"seed": 1.5}, "seed"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"stop": ["x"] * 17}, "stop"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
        ("chat", {"stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ("chat", {"n": True}, "n"),
        ("chat", {"store": 0}, "store"),
        ("chat", {"typical_p": 0.5}, "typical_p"),
        ("text", {"best_of": 3}, "best_of"),
        ("text", {"echo": True}, "echo"),
        ("text", {"suffix": "end"}, "suffix"),
        ("text", {"logprobs": 21}, "logprobs"),
        ("text", {"messages": []}, "messages"),
        ("text", {"prompt": []}, "prompt"),
        ("text", {"prompt": [5000]}, "prompt"),
        ("text", {"prompt": {"a": 1}}, "prompt"),
        ("text", {"prompt": ["x"] * 50}, "prompt"),
        ("text", {"prompt": "word " * 400}, "prompt"),
        ("text", {"max_tokens": 300}, "prompt"),
        ("text", {"model": None}, "model"),
    ],
)
def test_the_refused_field_is_named(
    server: Running, kind: str, fields: dict[str, object], param: str
) -> None:
    answer = post(server, kind, **fields)
    assert answer.status == 400, answer.text
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"] or error["code"] == "context_length_exceeded"
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": None, "user": "me"},
        {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        {"parallel_tool_calls": True, "metadata": {"a": "b"}, "service_tier": "auto", "stop": None},
        {"stream_options": None, "seed": None, "logprobs": False, "modalities": ["text"], "logit_bias": {}},
    ],
)
def test_neutral_values_are_accepted(server: Running, fields: dict[str, object]) -> None:
    answer = post(server, "chat", **fields)
    assert answer.status == 200, answer.text


def test_an_unknown_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client().completions.create(model="gpt", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt")


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}'])
def test_a_body_that_is_no_object(server: Running, body: bytes) -> None:
    answer = server.ask("POST", "/v1/completions", body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_unknown_paths_methods_and_huge_bodies(server: Running) -> None:
    assert server.ask("GET", "/v1/embeddings").status == 404
    answer = server.ask("GET", "/v1/completions")
    assert answer.status == 405
    assert "GET" in answer.error["message"]
    answer = server.ask("POST", "/v1/completions", b"{}", headers={"Content-Length": str(1 << 30)})
    assert answer.status == 413


def test_a_key_is_asked_for(tiny_llama: Path) -> None:
    engine = QueueEngine("fake", CountingSession(), queue=1, context=0, log=lambda text: None)
    with running(engine, tiny_llama, key="sesame") as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client("wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert server.ask("GET", "/metrics").status == 401
        assert json.loads(server.ask("GET", "/health").text)["status"] == "ok"
        assert len(list(server.client("sesame").models.list())) == 1


@pytest.fixture
def fake(tiny_llama: Path) -> Iterator[tuple[Running, CountingSession]]:
    """A server whose model does as told, with one place in the queue."""
    session, log = CountingSession(), list[str]()
    engine = QueueEngine("fake", session, queue=1, context=0, log=log.append)
    with running(engine, tiny_llama) as server:
        server.log = log
        yield server, session
        session.gate.set()
    assert session.closed


def test_a_failure_is_logged_and_not_shown(fake: tuple[Running, CountingSession]) -> None:
    server, session = fake
    session.fail = True
    whole = post(server, "chat")
    assert whole.status == 500
    assert whole.error["type"] == "server_error"
    streamed = post(server, "chat", stream=True)
    assert '"error"' in streamed.text
    assert "[DONE]" not in streamed.text
    for text in (whole.text, streamed.text):
        assert "secret" not in text
        assert "Traceback" not in text
    assert len([line for line in server.log if "secret detail" in line]) == 2
    with pytest.raises(openai.APIError):
        list(server.client().completions.create(model="tiny", prompt="x", stream=True))
    session.fail = False
    assert post(server, "chat").status == 200


def test_a_full_queue_is_503_with_a_time(fake: tuple[Running, CountingSession]) -> None:
    server, session = fake
    session.gate.clear()
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(post(server, "text").status)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: (server.engine.stats().active, server.engine.stats().waiting) == (1, 1))
    refused = post(server, "text")
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.error["code"] == "queue_full"
    assert json.loads(server.ask("GET", "/health").text)["waiting"] == 1
    session.gate.set()
    for thread in threads:
        thread.join(20)
    assert answers == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(fake: tuple[Running, CountingSession], stream: bool) -> None:
    server, session = fake
    session.gate.clear()
    body = {**TEXT, "max_tokens": 4000, "stream": stream}
    with pytest.raises(TimeoutError):
        server.ask("POST", "/v1/completions", body, timeout=0.5)
    name = 'losa_requests_total{endpoint="/v1/completions",outcome="cancelled"}'
    until(lambda: server.metric(name) == 1)
    session.gate.set()
    until(lambda: server.metric("losa_active_requests") == 0)
    assert server.metric("losa_generated_tokens_total") < 100
    assert post(server, "text").status == 200


def test_a_waiting_client_that_leaves_gives_its_place_back(fake: tuple[Running, CountingSession]) -> None:
    server, session = fake
    session.gate.clear()
    first = threading.Thread(target=post, args=(server, "text"))
    first.start()
    until(lambda: server.engine.stats().active == 1)
    with pytest.raises(TimeoutError):
        server.ask("POST", "/v1/completions", TEXT, timeout=0.5)
    until(lambda: server.engine.stats().waiting == 0)
    session.gate.set()
    first.join(20)
