"""A real server on a loopback port, over the tiny trained model or over a made-up engine."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
import uvicorn

from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.runtimes.server.app import create_app
from losa_deploy.runtimes.server.engine import Engine
from losa_deploy.runtimes.server.prepare import Model
from losa_deploy.runtimes.server.run import bind, configuration, url
from losa_deploy.runtimes.server.sequential import QueueEngine
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer

from ..parity.conftest import export_as, prune  # noqa: TID252


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def error(self) -> dict[str, str]:
        """OpenAI's error object."""
        found: dict[str, str] = json.loads(self.text)["error"]
        return found


@dataclass
class Running:
    """A server that answers at `url`; `log` is what it would write on stderr."""

    url: str
    engine: Engine
    log: list[str] = field(default_factory=list)

    def client(self, key: str = "none") -> openai.OpenAI:
        """The official client, without its own retries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        """One plain HTTP request; `body` is sent as JSON, or as it is if it is bytes."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=timeout)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers), response.read().decode())
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A value of /metrics, 0 if it is not there."""
        lines = [
            line for line in self.ask("GET", "/metrics").text.splitlines() if line.startswith(name + " ")
        ]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


@contextmanager
def running(
    engine: Engine,
    folder: Path,
    *,
    key: str = "",
    host: str = "127.0.0.1",
    tokenizer: Tokenizer | None = None,
) -> Iterator[Running]:
    """Serve `engine` with the tokenizer given, or that of `folder`, under the name `tiny`."""
    log: list[str] = []
    model = Model("tiny", tokenizer or load_tokenizer(folder), engine, 1)
    app = create_app(model, key=key, log=log.append, access=log.append)
    with bind(host, 0) as listening:
        server = uvicorn.Server(configuration(app, listening))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield Running(url(listening), engine, log)
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
    engine.close()


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for `condition`; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(tiny_llama: Path) -> Iterator[Running]:
    """The tiny model in torch, one request at a time, 8 waiting."""
    session = ReferenceRuntime().open(tiny_llama, threads=1)
    engine = QueueEngine("reference", session, queue=8, context=0, log=lambda text: None)
    with running(engine, tiny_llama) as found:
        yield found


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="session")
def gguf_models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny model, half of it pruned, as f32 GGUF files: packed (True) and portable."""
    merged = prune(tiny_llama, tmp_path_factory.mktemp("merged"))
    folder = tmp_path_factory.mktemp("gguf")
    recipe = ExportRecipe(value_type="f32", packed=True, portable=True)
    export_as(GgufExporter(), merged, recipe, folder)
    packed = next(folder.glob("*LOSA*.gguf"))
    return {True: packed, False: next(p for p in folder.glob("*.gguf") if p != packed)}
