"""Generation on top of any `Session`: a seeded sampler, end tokens, stop strings, streamed text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, UsageError
from losa_deploy.interfaces import Session
from losa_deploy.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue a prompt. Temperature 0 takes the most likely token (greedy)."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    """Sample among the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability; 1 for all."""
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the reply; they are not part of it."""

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 0, "0 or more"),
            ("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
        )
        for name, value, fine, expected in checks:
            if not fine:
                flag = name.replace("_", "-")
                raise UsageError(f"{name} is {value}, expected {expected}.", hint=f"Check --{flag}.")


def probabilities(logits: NDArray[np.float32], options: GenerateOptions) -> NDArray[np.float64]:
    """Sampling distribution [vocab] after temperature, then top-k, then top-p; needs a temperature above 0.

    Of equally likely tokens the lower id comes first, so that the choice is the same everywhere.
    """
    below = logits.astype(np.float64) - logits.max()
    kept = _top_k(below, options.top_k)
    with np.errstate(over="ignore"):  # the smallest temperatures: all but the best become exp(-inf) = 0
        weights = np.exp(below[kept] / options.temperature)
    weights /= weights.sum()
    if options.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        # A token stays if those before it do not yet reach top_p.
        before = np.cumsum(weights[order]) - weights[order]
        order = np.sort(order[before < options.top_p])
        kept, weights = kept[order], weights[order] / weights[order].sum()
    result = np.zeros(logits.shape, np.float64)
    result[kept] = weights
    return result


def pick(logits: NDArray[np.float32], options: GenerateOptions, random: np.random.Generator) -> int:
    """The next token; raises `InputError` if the model's logits are not numbers."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise InputError(
            f"The model returned {logits[best]} instead of a logit.",
            hint="Run `losa-deploy verify` on the model.",
        )
    if options.temperature == 0.0:
        return best
    cumulative = np.cumsum(probabilities(logits, options))
    # Scaling by the last sum keeps the draw inside it when rounding leaves the sum below 1.
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))


def generate(session: Session, prompt: Sequence[int], options: GenerateOptions) -> Iterator[int]:
    """Tokens after `prompt`, until a stop id, `max_tokens`, or the end of the model's context.

    Raises `InputError` if the prompt is empty or does not fit into the context.
    """
    if options.max_tokens == 0:
        return
    random = np.random.default_rng(options.seed)
    logits = session.prefill(prompt)
    count = options.max_tokens
    if session.context_length:
        count = min(count, session.context_length - len(prompt) + 1)
    for index in range(count):
        token = pick(logits, options, random)
        if token in options.stop_ids:
            return
        yield token
        if index + 1 < count:
            logits = session.step(token)


def stream_text(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    options: GenerateOptions,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation as text pieces; ends before the first of the `stop` strings."""
    return text_of(generate(session, prompt, options), tokenizer, stop)


def text_of(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Tokens as text pieces; takes no more of them once a `stop` string has come."""
    decoder = StreamDecoder(tokenizer)
    scanner = StopScanner(stop)
    for token in tokens:
        text = scanner.feed(decoder.feed(token))
        if text:
            yield text
        if scanner.stopped:
            return
    rest = scanner.feed(decoder.flush()) + scanner.flush()
    if rest:
        yield rest


class TokenClock:
    """Counts the tokens that pass, and the time from the first to the last."""

    def __init__(self) -> None:
        self.tokens = 0
        self._first = self._last = 0.0

    def watch(self, tokens: Iterable[int]) -> Iterator[int]:
        """The same tokens."""
        for token in tokens:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.tokens += 1
            yield token

    @property
    def per_second(self) -> float | None:
        """Tokens per second after the first one, so without the prompt; None of fewer than two."""
        seconds = self._last - self._first
        return (self.tokens - 1) / seconds if seconds > 0 else None


class StopScanner:
    """Passes text on up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text that is certainly before a stop string; nothing after one was found."""
        if self.stopped:
            return ""
        self._held += text
        found = [(i + len(s), i) for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            # The one complete first wins, as it would if the text came letter by letter.
            self.stopped = True
            passed, self._held = self._held[: min(found)[1]], ""
            return passed
        keep = max((_overlap(self._held, s) for s in self._stop), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, shorter than `stop` itself."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


def _top_k(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Indices, ascending, of the k largest values; of equal ones the lower index wins. 0: all."""
    size = len(values)
    if k == 0 or k >= size:
        return np.arange(size, dtype=np.int64)
    threshold = np.partition(values, size - k)[size - k]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: k - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)
