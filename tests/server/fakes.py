"""Sessions whose speed and failures a test decides; the HTTP layer and the queue are what is tested."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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
