"""Perplexity with its standard error on token windows; `literature.py` has the windows of the papers.

Windows do not overlap, so that every token is scored once; the first of a window has no history
and is not scored, unless the tokenizer begins texts with a token of its own, which then stands
before every window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losa_deploy.errors import InputError
from losa_deploy.interfaces import Session
from losa_deploy.text.tokenizer import Tokenizer
from losa_deploy.verify.distance import ROWS, Floats, Logits, log_softmax


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, and the standard errors of that estimate.

    By the delta method a standard error s of the mean is perplexity·s of the perplexity.
    `stderr` treats tokens as independent (as llama.cpp's tool does), `stderr_windows` only windows
    (None with fewer than two).
    """

    perplexity: float
    stderr: float
    stderr_windows: float | None
    tokens: int
    """Tokens scored."""
    window: int
    windows: int

    @property
    def error(self) -> float:
        """`stderr_windows`, because tokens of one text depend on each other; of one window `stderr`."""
        return self.stderr if self.stderr_windows is None else self.stderr_windows


@dataclass(frozen=True)
class Mean:
    """A mean over all values of all windows, each weighing the same, and its standard errors."""

    value: float
    over_values: float
    """Standard error if the values were independent; 0 for one value."""
    over_windows: float | None
    """Standard error if only the windows are independent; None with fewer than two."""
    count: int

    @property
    def stderr(self) -> float:
        """The error over windows: values in one text depend on each other. Of one window over its values."""
        return self.over_values if self.over_windows is None else self.over_windows


def split_windows(tokens: Sequence[int], window: int, start: int | None = None) -> list[list[int]]:
    """Consecutive windows of `window` tokens, the last one shorter (dropped below two tokens).

    With `start`, each window begins with it and takes `window` - 1 tokens of the text.
    Raises `InputError` if not one window comes out.
    """
    head = [] if start is None else [start]
    step = window - len(head)
    pieces = [head + list(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    result = [piece for piece in pieces if len(piece) >= 2]
    if not result:
        raise InputError(
            f"The evaluation text has {len(tokens)} tokens, too few to score one.",
            hint="Give a longer text.",
        )
    return result


def text_windows(tokenizer: Tokenizer, text: str, window: int, max_tokens: int) -> list[list[int]]:
    """Windows of the first `max_tokens` tokens of `text`, each with the tokenizer's own first token."""
    plain = tokenizer.encode(text, special=False)[:max_tokens]
    full = tokenizer.encode(text[:200])
    start = full[0] if full and full[0] == tokenizer.bos_id and full[0] != plain[0] else None
    return split_windows(plain, window, start)


def negative_log_likelihoods(logits: Logits, tokens: Sequence[int]) -> Floats:
    """-log p of tokens[1:], each given those before it, in nats; logits [len(tokens), vocab]."""
    targets = np.asarray(tokens[1:])
    result = np.empty(len(targets), np.float64)
    for start in range(0, len(targets), ROWS):
        rows = slice(start, min(start + ROWS, len(targets)))
        logs = log_softmax(logits[rows])
        result[rows] = -logs[np.arange(len(logs)), targets[rows]]
    return result


def mean_of_windows(windows: Sequence[Floats]) -> Mean:
    """The mean of the values [n] of every window, and its standard errors."""
    values = np.concatenate(windows)
    mean = float(values.mean())
    of_values = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    of_windows = None
    if len(windows) > 1:
        weights = np.array([len(window) for window in windows]) / len(values)
        deviations = np.array([float(window.mean()) for window in windows]) - mean
        count = len(windows)
        of_windows = math.sqrt(count / (count - 1) * float(((weights * deviations) ** 2).sum()))
    return Mean(mean, of_values, of_windows, len(values))


def summarize(losses: Sequence[Floats], window: int) -> Perplexity:
    """Perplexity of negative log-likelihoods [n] per window, every token weighing the same."""
    mean = mean_of_windows(losses)
    perplexity = math.exp(mean.value)
    return Perplexity(
        perplexity,
        perplexity * mean.over_values,
        None if mean.over_windows is None else perplexity * mean.over_windows,
        mean.count,
        window,
        len(losses),
    )


def window_losses(session: Session, windows: Sequence[Sequence[int]]) -> list[Floats]:
    """Negative log-likelihoods [n] of every window, each from an empty cache."""
    return [negative_log_likelihoods(session.logits(w), w) for w in windows]


def perplexity(session: Session, windows: Sequence[Sequence[int]], window: int) -> Perplexity:
    """Score every window from an empty cache."""
    return summarize(window_losses(session, windows), window)


def loss_difference(first: Sequence[Floats], second: Sequence[Floats]) -> Mean:
    """Mean of first - second over the tokens that both scored, in nats.

    Far more certain than the two perplexities apart, because both models meet the same hard tokens.
    """
    return mean_of_windows([a - b for a, b in zip(first, second, strict=True)])
