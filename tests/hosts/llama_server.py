"""A stock llama-server with the sparse backend: starts it, asks it for a completion, and stops it.

    python tests/hosts/llama_server.py path/to/llama-server MODEL.gguf [--route a|b|off]

The server is llama.cpp's own, built with loadable backends (`-DGGML_BACKEND_DL=ON -DBUILD_SHARED_LIBS=ON`);
nothing but GGML_BACKEND_PATH tells it of us. MODEL is a portable file with a tokenizer. Prints one JSON
document; exit code 1 if the server does not answer, or did not load the backend.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

PATIENCE = 300.0
"""Seconds that a start, or an answer, may take."""


def ask(port: int, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
    """The JSON answer; raises `OSError` if there is none."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        document: dict[str, object] = json.load(answer)
        return document


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        try:
            ask(port, "/health")
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise SystemExit("The server did not become ready.")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plugin_path() -> str:
    command = [sys.executable, "-m", "losa_deploy", "ggml-backend", "--path"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(args: argparse.Namespace, log: Path) -> dict[str, object]:
    """The answer, its time, and what the backend said."""
    port = free_port()
    environment = {
        **os.environ,
        "GGML_BACKEND_PATH": plugin_path(),
        "LOSA_GGML": args.route,
        "LOSA_GGML_VERBOSE": "1",
    }
    command = [args.server, "-m", args.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(args.threads), "-c", "512", "--no-webui", "-np", "1"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            wait_until_ready(port, server)
            body: dict[str, object] = {"prompt": args.prompt, "n_predict": 16, "temperature": 0}
            answer = ask(port, "/completion", body)
        finally:
            server.terminate()
            server.wait()
    said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("losa:")]
    return {"content": answer["content"], "timings": answer.get("timings"), "backend": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("server")
    parser.add_argument("model")
    parser.add_argument("--route", default="a", choices=("a", "b", "off"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", default="The capital of France is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        try:
            result = run(args, log)
        except (SystemExit, OSError) as error:
            sys.stderr.write(log.read_text("utf-8", "replace")[-4000:] if log.exists() else "")
            sys.stderr.write(f"{error}\n")
            return 1
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    wanted = "losa: off" if args.route == "off" else f"losa: route {args.route} "
    return 0 if any(line.startswith(wanted) for line in result["backend"]) else 1  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
