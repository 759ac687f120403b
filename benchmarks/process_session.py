"""A model in a process of its own, behind the interface of a session: libraries that do not go together."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import LosaError, ResourceError

from .memory import error_message

CLOSE_SECONDS = 30.0


class ProcessSession:
    """One sequence in a process of its own. The context grows as it must: no length is refused here."""

    context_length = 0

    def __init__(
        self, command: Sequence[str], model: Path, program: str, last_words: Callable[[str], str]
    ) -> None:
        """Runs `command`, which answers as `process_worker.serve` does.

        `program` is what messages call it, `last_words` finds the reason in what it said at its end.
        """
        self._model, self._program, self._last_words = model, program, last_words
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
        said = self._last_words(self._log.read().decode("utf-8", "replace"))
        return LosaError(
            f"{self._program} ended with exit code {code} at {self._model}: {error_message(said)}",
            hint="Leave this peer out.",
        )
