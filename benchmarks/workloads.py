"""Workloads: how many tokens are read and written in one sample, and how many samples are kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """`prompt_tokens` in one prefill, then `decode_tokens` one by one; `warmup` samples are dropped."""

    name: str
    prompt_tokens: int
    decode_tokens: int
    samples: int
    warmup: int = 1

    def fits(self, context: int) -> Workload:
        """The same workload cut to a context length of `context` tokens (prompt first)."""
        decode = min(self.decode_tokens, max(1, context // 2))
        return Workload(
            self.name, min(self.prompt_tokens, context - decode), decode, self.samples, self.warmup
        )


QUICK = Workload("quick", prompt_tokens=128, decode_tokens=32, samples=5)
"""What the report of every run is made with."""
STANDARD = Workload("pp512+tg128", prompt_tokens=512, decode_tokens=128, samples=5)
"""Lengths at which others publish their numbers (`pp512`, `tg128`)."""
WORKLOADS = {workload.name: workload for workload in (QUICK, STANDARD)}


def prompt_tokens(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """`count` pseudo-random ids below `vocab_size`: dense transformers take equally long for any text."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, count)
    return [int(i) for i in ids]
