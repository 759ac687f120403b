"""Speed of several models, side by side: prefill and decode in tokens per second, and load time.

All models stay open and take turns in a shuffled order, so that a change of the machine's clock
or load during the run meets all of them alike. Every sample is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from statistics import median, pstdev

from losa_deploy.interfaces import Session

from .workloads import Workload, prompt_tokens

Open = Callable[[], Session]
SETTLE_SECONDS = 0.05
"""Pause before a sample: the idle threads of the runtime measured before stop spinning."""


@dataclass(frozen=True)
class Sample:
    """One prefill and one decode of a model, in seconds."""

    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Latency:
    """All samples of one model under one workload."""

    workload: Workload
    load_seconds: float
    samples: tuple[Sample, ...]

    @property
    def prefill_rates(self) -> tuple[float, ...]:
        """Prompt tokens per second, one per sample."""
        return tuple(self.workload.prompt_tokens / s.prefill_seconds for s in self.samples)

    @property
    def decode_rates(self) -> tuple[float, ...]:
        """Generated tokens per second, one per sample."""
        return tuple(self.workload.decode_tokens / s.decode_seconds for s in self.samples)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Median over the samples."""
        return median(self.prefill_rates)

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over the samples."""
        return median(self.decode_rates)

    @property
    def decode_spread(self) -> float:
        """Relative standard deviation of the decode rate."""
        return pstdev(self.decode_rates) / self.decode_tokens_per_second


def schedule(names: Sequence[str], rounds: int, seed: int) -> list[str]:
    """Every name once per round, each round in its own order; the same seed gives the same list."""
    random = Random(seed)
    order: list[str] = []
    for _ in range(rounds):
        turn = list(names)
        random.shuffle(turn)
        order += turn
    return order


def measure_latency(
    models: Mapping[str, Open],
    workload: Workload,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[float], None] = time.sleep,
) -> dict[str, Latency]:
    """Open all models, then sample them interleaved; `workload.warmup` rounds are thrown away."""
    loads: dict[str, float] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in models}
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, open_model in models.items():
            start = clock()
            sessions[name] = open_model()
            loads[name] = clock() - start
            stack.callback(sessions[name].close)
        vocabulary = min(session.vocab_size for session in sessions.values())
        prompt = prompt_tokens(workload.prompt_tokens, vocabulary, seed)
        for name in schedule(list(models), workload.warmup + workload.samples, seed):
            settle(SETTLE_SECONDS)
            samples[name].append(sample(sessions[name], prompt, workload.decode_tokens, clock))
    return {name: Latency(workload, loads[name], tuple(samples[name][workload.warmup :])) for name in models}


def sample(session: Session, prompt: Sequence[int], decode_tokens: int, clock: Callable[[], float]) -> Sample:
    """Time one prefill, then `decode_tokens` greedy steps."""
    start = clock()
    logits = session.prefill(prompt)
    between = clock()
    for _ in range(decode_tokens):
        logits = session.step(int(logits.argmax()))
    return Sample(between - start, clock() - between)
