"""Numbers that say how far two open models are apart: logits, greedy tokens, divergence.

Everything here works on logits as NumPy arrays and on the `Session` interface, so that the same
functions serve verification (exported against merged) and evaluation (merged against dense).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_deploy.interfaces import Session

Floats = NDArray[np.float64]
Logits = NDArray[np.float32]

F32_UNIT = float(np.finfo(np.float32).eps)
ROWS = 64
"""Positions handled at once: bounds the f64 copy to 64 × vocabulary."""


def log_softmax(logits: Logits) -> Floats:
    """Natural log-probabilities [..., vocab], computed in f64."""
    wide: Floats = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def kl_divergence(reference: Logits, other: Logits) -> Floats:
    """KL(reference || other) in nats, per position, of two logit arrays [n, vocab]."""
    result = np.empty(len(reference), np.float64)
    for start in range(0, len(reference), ROWS):
        p = log_softmax(reference[start : start + ROWS])
        q = log_softmax(other[start : start + ROWS])
        result[start : start + ROWS] = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(result, 0.0)


def logit_tolerance(largest_logit: float, blocks: int, inner: int) -> float:
    """Largest difference two correct f32 evaluations of one network may show.

    A sum of n products carries a relative rounding error of about eps·√n whatever its order
    (probabilistic error analysis), n being at most `inner`, the longest dot product. Each block
    updates the residual stream twice, embedding and head add two more; in the worst case the
    2·blocks + 2 errors add up. The result is relative to the largest logit.
    """
    return F32_UNIT * float(np.sqrt(inner)) * (2 * blocks + 2) * max(1.0, largest_logit)


@dataclass(frozen=True)
class Comparison:
    """One model against a reference over the same positions."""

    max_abs_logit_difference: float
    largest_logit: float
    """Largest absolute logit of the reference."""
    mean_kl: float
    max_kl: float
    same_top_rate: float
    """Share of positions with the same most likely token."""
    positions: int


def compare_logits(reference: Sequence[Logits], other: Sequence[Logits]) -> Comparison:
    """Compare logit arrays [n, vocab] pair by pair; shapes must agree (`ValueError` otherwise).

    Non-finite logits in `other` give an infinite difference, never a silent pass.
    """
    difference = largest = 0.0
    same = 0
    kl: list[Floats] = []
    for expected, found in zip(reference, other, strict=True):
        if expected.shape != found.shape:
            raise ValueError(f"logits of shape {found.shape}, expected {expected.shape}")
        if not np.isfinite(found).all():
            return Comparison(np.inf, float(np.abs(expected).max()), np.inf, np.inf, 0.0, len(found))
        difference = max(difference, float(np.abs(expected - found).max()))
        largest = max(largest, float(np.abs(expected).max()))
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        kl.append(kl_divergence(expected, found))
    values = np.concatenate(kl)
    return Comparison(
        difference, largest, float(values.mean()), float(values.max()), same / len(values), len(values)
    )


@dataclass(frozen=True)
class GreedyTrace:
    """Greedy continuation of one prompt: the tokens chosen and the logits each was chosen from."""

    tokens: tuple[int, ...]
    logits: Logits
    """[steps, vocab]"""

    @classmethod
    def of(cls, logits: Logits) -> GreedyTrace:
        """The trace of logits [steps, vocab]."""
        return cls(tuple(int(token) for token in logits.argmax(-1)), logits)

    def margin(self, step: int) -> float:
        """Distance between the two largest logits at a step: how sure the choice was."""
        second, first = np.partition(self.logits[step], -2)[-2:]
        return float(first - second)


def greedy(session: Session, prompt: Sequence[int], steps: int) -> GreedyTrace:
    """The `steps` most likely next tokens, one at a time through the key/value cache."""
    logits = [session.prefill(prompt)]
    for _ in range(steps - 1):
        logits.append(session.step(int(logits[-1].argmax())))
    return GreedyTrace.of(np.stack(logits).astype(np.float32))


@dataclass(frozen=True)
class GreedyComparison:
    """Two greedy traces of the same prompt, up to and including their first difference."""

    equal: bool
    first_difference: int
    """Step of the first different token; the number of steps if there is none."""
    margin: float
    """The reference's own top-two margin at the first difference; 0 if there is none."""
    max_abs_logit_difference: float
    """Over the steps with a common history."""

    @property
    def tie(self) -> bool:
        """Different, but no further than the logits themselves differ: the reference was undecided.

        A margin is between two logits, whose errors are independent: it is off by √2 times as much as one.
        (Twice the difference would excuse every token.)
        """
        return not self.equal and self.margin <= 2**0.5 * self.max_abs_logit_difference


def compare_greedy(reference: GreedyTrace, other: GreedyTrace) -> GreedyComparison:
    """Compare two traces while their histories agree; after the first difference they mean nothing."""
    steps = len(reference.tokens)
    unequal = [i for i in range(steps) if reference.tokens[i] != other.tokens[i]]
    first = unequal[0] if unequal else steps
    shared = slice(0, min(first + 1, steps))
    gap = np.abs(reference.logits[shared] - other.logits[shared])
    difference = float(gap.max()) if np.isfinite(gap).all() else float("inf")
    margin = reference.margin(first) if unequal else 0.0
    return GreedyComparison(not unequal, first, margin, difference)
