"""What comes before a request is read: its host, type, length and pace, byte by byte over sockets."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from losa_deploy.runtimes.server import gate, protocol, run
from losa_deploy.runtimes.server.sequential import QueueEngine

from .conftest import Answer, Running, running, until
from .fakes import CountingSession

TEXT = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
POSTS = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}
JSON = "Content-Type: application/json"
MIB = 1 << 20


@pytest.fixture(scope="module")
def fast(tiny_llama: Path) -> Iterator[Running]:
    """A server without a key whose model costs nothing."""
    engine = QueueEngine("fake", CountingSession(), queue=8, context=0, log=lambda text: None)
    with running(engine, tiny_llama) as server:
        yield server


def connect(server: Running) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(*lines: str, path: str = "/v1/completions") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def closed(client: socket.socket) -> Answer:
    """What the server sends until it closes the connection, which it must do."""
    data = b""
    while part := client.recv(1 << 16):
        data += part
    top, _, body = data.decode().partition("\r\n\r\n")
    status, *lines = top.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(status.split()[1]), headers, body)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "text/json"],
)
def test_other_types_than_json_are_415(fast: Running, path: str, kind: str) -> None:
    answer = fast.ask("POST", path, POSTS[path], headers={"Content-Type": kind})
    assert answer.status == 415
    assert answer.error["type"] == "invalid_request_error"
    assert "application/json" in answer.error["message"]
    assert kind.partition(";")[0] in answer.error["message"]


def test_a_missing_type_is_415(fast: Running) -> None:
    body = json.dumps(TEXT).encode()
    with connect(fast) as client:
        client.sendall(head(f"Content-Length: {len(body)}") + body)
        answer = closed(client)
    assert answer.status == 415
    assert "is missing" in answer.error["message"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"]
)
def test_all_json_types_are_taken(fast: Running, path: str, kind: str) -> None:
    assert fast.ask("POST", path, POSTS[path], headers={"Content-Type": kind}).status == 200


def test_a_chunked_body_is_taken(fast: Running) -> None:
    body = json.dumps(TEXT).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    with connect(fast) as client:
        client.sendall(head(JSON, "Transfer-Encoding: chunked", "Connection: close") + chunks + b"0\r\n\r\n")
        assert closed(client).status == 200


def test_a_chunked_body_that_is_too_large_is_413(fast: Running) -> None:
    with connect(fast) as client:
        client.sendall(head(JSON, "Transfer-Encoding: chunked"))
        for _ in range(17):
            client.sendall(b"%x\r\n%b\r\n" % (MIB, b" " * MIB))
        client.sendall(b"0\r\n\r\n")
        answer = closed(client)
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert answer.error["code"] == "body_too_large"


def test_a_body_without_end_is_cut_off(fast: Running) -> None:
    with connect(fast) as client:
        client.sendall(head(JSON, "Transfer-Encoding: chunked"))
        with pytest.raises(ConnectionError):
            for _ in range(200):
                client.sendall(b"%x\r\n%b\r\n" % (MIB, b" " * MIB))
    assert fast.ask("GET", "/health").status == 200


def test_a_large_declared_body_is_413_and_the_client_sees_it(fast: Running) -> None:
    answer = fast.ask("POST", "/v1/completions", b" " * (17 * MIB))
    assert answer.status == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "9" * 30, "5, 6", "5\r\nContent-Length: 6"])
def test_a_wrong_length_is_400(fast: Running, length: str) -> None:
    with connect(fast) as client:
        client.sendall(head(JSON, f"Content-Length: {length}") + b"{}")
        answer = closed(client)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_http"


def test_a_client_that_leaves_within_its_body(fast: Running, caplog: pytest.LogCaptureFixture) -> None:
    name = 'losa_requests_total{endpoint="/v1/completions",outcome="cancelled"}'
    before = fast.metric(name)
    with connect(fast) as client:
        client.sendall(head(JSON, "Content-Length: 100") + b"{")
    until(lambda: fast.metric(name) == before + 1)
    assert not caplog.records


def test_a_slow_body_is_408(fast: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(gate, "LINGER_SECONDS", 0.3)
    with connect(fast) as client:
        client.sendall(head(JSON, "Content-Length: 100") + b"{")
        answer = closed(client)
    assert answer.status == 408
    assert answer.error["code"] == "body_timeout"


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_slow_headers_end_the_connection(
    fast: Running, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    with connect(fast) as client:
        if first:
            client.sendall(first)
            data = b""
            while b'"ok"' not in data:
                data += client.recv(1 << 16)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        assert client.recv(1 << 16) == b""


@pytest.mark.parametrize(
    "name", ["localhost:80", "127.0.0.1", "127.9.9.9:1", "[::1]:8080", "a.localhost.", "LOCALHOST"]
)
def test_names_of_loopback_are_answered(fast: Running, name: str) -> None:
    assert fast.ask("GET", "/health", headers={"Host": name}).status == 200


@pytest.mark.parametrize(
    "name", ["evil.example", "localhost.evil.example:80", "10.0.0.1", "127.0.0.1.evil.example", ""]
)
def test_foreign_names_are_refused_on_loopback(fast: Running, name: str) -> None:
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/completions")):
        answer = fast.ask(method, path, TEXT if method == "POST" else None, headers={"Host": name})
        assert answer.status == 403
        assert answer.error["code"] == "host_not_allowed"
        assert "--api-key" in answer.error["message"]


@pytest.mark.parametrize(("host", "key"), [("127.0.0.1", "sesame"), ("0.0.0.0", "")])
def test_any_name_is_answered_with_a_key_or_beyond_loopback(tiny_llama: Path, host: str, key: str) -> None:
    engine = QueueEngine("fake", CountingSession(), queue=1, context=0, log=lambda text: None)
    with running(engine, tiny_llama, host=host, key=key) as server:
        headers = {"Host": "models.example", "Authorization": f"Bearer {key}"}
        assert server.ask("GET", "/v1/models", headers=headers).status == 200


def test_the_name_given_to_host_is_answered(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *args: object, **kwargs: object) -> object:
        return real("127.0.0.1" if host == "Box.example" else host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    engine = QueueEngine("fake", CountingSession(), queue=1, context=0, log=lambda text: None)
    with running(engine, tiny_llama, host="Box.example") as server:
        assert server.ask("GET", "/health", headers={"Host": "box.example:80"}).status == 200
        assert server.ask("GET", "/health", headers={"Host": "fox.example:80"}).status == 403


def test_a_request_that_outlasts_the_server_is_503(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "GRACE_SECONDS", 1)
    session, answers = CountingSession(), list[Answer]()
    engine = QueueEngine("fake", session, queue=1, context=0, log=lambda text: None)
    session.gate.clear()
    with caplog.at_level(logging.ERROR), running(engine, tiny_llama) as server:
        client = threading.Thread(
            target=lambda: answers.append(server.ask("POST", "/v1/completions", TEXT)), daemon=True
        )
        client.start()
        until(lambda: engine.stats().active == 1)
        threading.Timer(3, session.gate.set).start()
    client.join(20)
    assert [a.status for a in answers] == [503]
    assert answers[0].error["code"] == "shutting_down"
    assert not [r for r in caplog.records if r.exc_info]
