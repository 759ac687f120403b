"""`losa-deploy serve` as a program: ready line, clients, load, the end, and its refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from losa_deploy.cli.main import main
from losa_deploy.runtimes.server.run import GRACE_SECONDS

LOAD = Path(__file__).parents[1] / "hosts" / "serve_load.py"


@contextmanager
def served(model: Path, *flags: str, key: str = "") -> Iterator[dict[str, object]]:
    """What the running program says when it is ready; it is ended with Ctrl-C, which is no failure."""
    argv = [
        sys.executable,
        "-m",
        "losa_deploy",
        "serve",
        "-m",
        str(model),
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "LOSA_API_KEY": key, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*argv, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            line = process.stdout.readline()
            if not line:
                raise AssertionError(process.communicate()[1])
            lines.append(line)
        yield json.loads("".join(lines))
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
        assert process.returncode == 0
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def text(url: object, name: str, key: str = "none") -> str:
    client = openai.OpenAI(base_url=str(url), api_key=key, max_retries=0)
    answer = client.completions.create(model="tiny", prompt=f"{name} has", max_tokens=8, temperature=0)
    return answer.choices[0].text


@pytest.mark.parametrize("packed", [False, True])
def test_a_gguf_file_is_served_in_parallel(gguf_models: dict[bool, Path], packed: bool) -> None:
    with served(gguf_models[packed], "--model-name", "tiny") as ready:
        assert ready["schema"] == "losa.serve/1"
        assert (ready["runtime"], ready["slots"], ready["context_length"]) == ("llamacpp", 4, 256)
        assert len(text(ready["url"], "Anna")) > 5
        load = [sys.executable, str(LOAD), str(ready["url"]), "--clients", "8", "--seconds", "3"]
        done = subprocess.run(load, capture_output=True, text=True, check=False)
        figures = json.loads(done.stdout)
        assert done.returncode == 0, figures
        assert figures["errors"] == 0
        assert figures["requests"] >= 8
        assert figures["p95_seconds"] >= figures["p50_seconds"] > 0


@pytest.mark.parametrize("mode", ["ngram", "draft"])
def test_the_flag_of_drafts_reaches_the_engine(
    gguf_models: dict[bool, Path], tiny_dense_onnx: Path, mode: str
) -> None:
    flags = ["--speculate", mode, *(["--draft", str(tiny_dense_onnx)] if mode == "draft" else [])]
    with served(gguf_models[True], "--model-name", "tiny", *flags) as ready:
        assert len(text(ready["url"], "Anna has 2 red apples. " * 4 + "Anna")) > 5
        address = str(ready["url"]).removesuffix("/v1")
        with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
    (drafted,) = (line for line in lines if line.startswith("losa_drafted_tokens_total "))
    assert float(drafted.split()[1]) > 0


def test_an_onnx_folder_is_served_with_a_key(tiny_dense_onnx: Path) -> None:
    flags = ("--model-name", "tiny", "--queue", "3", "--context", "100")
    with served(tiny_dense_onnx, *flags, key="sesame") as ready:
        assert (ready["runtime"], ready["slots"], ready["queue"]) == ("ort", 1, 3)
        assert ready["context_length"] == 100
        assert len(text(ready["url"], "Anna", "sesame")) > 5
        with pytest.raises(openai.AuthenticationError):
            text(ready["url"], "Anna")


def test_a_stalled_body_does_not_hold_up_the_end(tiny_llama: Path) -> None:
    with socket.socket() as client, ThreadPoolExecutor(1) as pool:
        with served(tiny_llama, "--model-name", "tiny") as ready:
            host, _, port = str(ready["url"]).removeprefix("http://").removesuffix("/v1").partition(":")
            client.connect((host, int(port)))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            text(ready["url"], "Anna")
            end, start = pool.submit(closed, client), time.monotonic()
        assert end.result() - start < GRACE_SECONDS  # the interpreter takes its own time after that


def closed(client: socket.socket) -> float:
    """When the server closed the connection without a word."""
    assert client.recv(1) == b""
    return time.monotonic()


Refused = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """A function: arguments of `serve` → exit code and stderr, in this process."""

    def serve(*argv: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(["serve", *argv])
        streams = capfd.readouterr()
        assert streams.out == ""
        assert "Traceback" not in streams.err
        return code, streams.err

    return serve


def test_a_port_in_use(tiny_llama: Path, refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, words = refused("-m", str(tiny_llama), "--port", str(port))
    assert code == 2
    assert f"Port {port} on 127.0.0.1 is in use" in words
    assert words.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "70000"), "--port is 70000"),
        (("--queue", "-1"), "--queue is -1"),
        (("--parallel", "2"), "one request at a time"),
        (("--host", "no such host"), "--host"),
        (("--api-key", ""), "--api-key is empty"),
    ],
)
def test_wrong_flags(tiny_llama: Path, flags: tuple[str, ...], words: str, refused: Refused) -> None:
    code, found = refused("-m", str(tiny_llama), "--port", "0", *flags)
    assert code == 2
    assert words in found


def test_the_missing_extra_is_named(tiny_llama: Path) -> None:
    program = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from losa_deploy.cli.main import main\n"
        f"sys.exit(main(['serve', '-m', {str(tiny_llama)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert 'pip install "losa-deploy[serve]"' in done.stderr
