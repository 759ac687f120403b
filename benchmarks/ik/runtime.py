"""ik_llama.cpp behind the interface of a runtime: each session is a process of `worker.py`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import LosaError, ResourceError
from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import Runtime

from ..memory import Footprint, error_message, run_probe
from .package import IkPackage, last_words

WORKER = "losa_deploy.benchmarks.ik.worker"
CLOSE_SECONDS = 30.0


class IkRuntime(Runtime):
    """Opens dense GGUF files in ik_llama.cpp, repacking their weights."""

    name = "ik"
    opens = "a GGUF file, or a folder with one"
    preference = -1

    def __init__(self, package: IkPackage) -> None:
        self.package = package

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return folder.suffix == ".gguf" or any(folder.glob("*.gguf"))

    def open(self, folder: Path, *, threads: int) -> IkSession:
        """Start a process that holds the model; raises what it cannot do as a `LosaError`."""
        return IkSession(self._command(folder, threads), folder)

    def footprint(self, folder: Path, threads: int) -> Footprint:
        """As `measure_footprint`: of a fresh process."""
        return run_probe([*self._command(folder, threads), "--probe", "64", "16"], folder, timeout=600.0)

    def _command(self, folder: Path, threads: int) -> list[str]:
        path = folder if folder.is_file() else find_gguf(folder)
        return [sys.executable, "-m", WORKER, str(self.package.folder), str(path), str(threads)]


class IkSession:
    """One sequence in a process of its own. The context grows as it must: no length is refused here."""

    context_length = 0

    def __init__(self, command: Sequence[str], model: Path) -> None:
        self._model = model
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the session)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self.vocab_size = self._header()["vocab_size"]
        except BaseException:
            self.close()
            raise

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        found = self._ask({"do": "logits", "tokens": list(tokens)})
        return found.reshape(len(tokens), self.vocab_size)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence with `tokens`; logits [vocab] after the last one."""
        return self._ask({"do": "prefill", "tokens": list(tokens)})

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        return self._ask({"do": "step", "token": token})

    def close(self) -> None:
        """End the process, and the model with it."""
        try:
            self._process.communicate(timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._log.close()

    def _ask(self, request: dict[str, object]) -> NDArray[np.float32]:
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._ended() from None
        size = self._header()["bytes"]
        found = self._answers.read(size)
        if len(found) < size:
            raise self._ended()
        return np.frombuffer(found, np.float32)

    def _header(self) -> dict[str, int]:
        line = self._answers.readline()
        if not line:
            raise self._ended()
        header: dict[str, int] = json.loads(line)
        return header

    def _ended(self) -> LosaError:
        """Why the process is gone."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return ResourceError(
                f"The process with {self._model} was killed: out of memory.",
                hint="Close other programs, or leave this peer out.",
            )
        self._log.seek(0)
        said = last_words(self._log.read().decode("utf-8", "replace"))
        return LosaError(
            f"ik_llama.cpp ended with exit code {code} at {self._model}: {error_message(said)}",
            hint="Leave this peer out.",
        )
