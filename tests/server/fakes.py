"""Sessions and a tokenizer whose speed and failures a test decides; the layers around them are tested."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from losa_deploy.text.tokenizer import Tokenizer

LONG = 10_000
"""Characters from which on `HeldTokenizer` waits."""


class CountingSession:
    """Says token after token in turn, 40 … 59; each step waits for `gate`, if there is one."""

    vocab_size = 300
    context_length = 4096

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.steps = 0
        self.closed = False

    def _logits(self) -> NDArray[np.float32]:
        self.gate.wait(20)
        if self.fail:
            raise RuntimeError("secret detail of the failure")
        self.steps += 1
        values = np.zeros(self.vocab_size, np.float32)
        values[40 + self.steps % 20] = 10.0
        return values

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([self._logits() for _ in tokens])

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._logits()

    def step(self, token: int) -> NDArray[np.float32]:
        return self._logits()

    def close(self) -> None:
        self.closed = True


class HeldTokenizer(Tokenizer):
    """A real tokenizer that takes as long for long texts as `gate` is not set."""

    def __init__(self, real: Tokenizer) -> None:
        super().__init__(real._inner, real.folder)
        self.gate = threading.Event()
        self.lock = threading.Lock()
        self.running = self.most = self.texts = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        if len(text) < LONG:
            return super().encode(text, special=special)
        self._hold()
        return super().encode(text, special=special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if sum(len(m["content"]) for m in messages) >= LONG:
            self._hold()
        return super().chat(messages)

    def _hold(self) -> None:
        with self.lock:
            self.texts += 1
            self.running += 1
            self.most = max(self.most, self.running)
        self.gate.wait(60)
        with self.lock:
            self.running -= 1
