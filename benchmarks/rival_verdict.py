"""Which file to take: the artifact, or llama.cpp's quantization of the same model, by this run's numbers."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_NOISE = 0.02
"""Speeds closer than this are equal, however little the samples spread."""
SURE = 2.0
"""Standard errors that a difference in loss has to exceed."""


@dataclass(frozen=True)
class Side:
    """One of the two files; sizes in bytes, speeds in tokens per second."""

    name: str
    bytes: int
    perplexity: float
    decode: float
    prefill: float
    rss: int

    @property
    def numbers(self) -> str:
        """All of them in one line."""
        return (
            f"{self.bytes / 1e6:.1f} MB, perplexity {self.perplexity:.2f}, decode {self.decode:.1f} and "
            f"prefill {self.prefill:.0f} tokens/s, peak {self.rss / 1e6:.0f} MB"
        )


@dataclass(frozen=True)
class Match:
    """Both on the same windows and in the same turns."""

    ours: Side
    rival: Side
    loss_difference: float
    """Mean of ours minus the rival's over the same tokens, nats per token."""
    loss_error: float
    """Its standard error."""
    decode_noise: float
    """Relative standard deviation of the decode speed, the larger of the two."""


def match_line(m: Match) -> str:
    """The numbers of both, and which to take for quality per byte and for speed."""
    return (
        f"{m.rival.name} of the same model in llama.cpp: {m.rival.numbers}; {m.ours.name}: {m.ours.numbers}. "
        f"{quality_advice(m)}; {speed_advice(m)}."
    )


def quality_advice(m: Match) -> str:
    """By size and loss. Where one is smaller and the other better, two numbers do not decide."""
    smaller, larger = (m.ours, m.rival) if m.ours.bytes <= m.rival.bytes else (m.rival, m.ours)
    saved = f"{1 - smaller.bytes / larger.bytes:.0%} smaller"
    error = f"{abs(m.loss_difference):.3f} ± {m.loss_error:.3f} nats per token"
    if abs(m.loss_difference) <= SURE * m.loss_error:
        chance = f"the losses differ by no more than chance ({error})"
        if m.ours.bytes == m.rival.bytes:
            return f"For quality per byte either: both have the same size, {chance}"
        return f"For quality per byte take {smaller.name}: {saved}, {chance}"
    better, worse = (m.ours, m.rival) if m.loss_difference < 0 else (m.rival, m.ours)
    if better is smaller or m.ours.bytes == m.rival.bytes:
        less = f"{saved} and " if better.bytes < worse.bytes else ""
        return f"For quality per byte take {better.name}: {less}{error} better"
    return (
        f"For quality per byte neither wins: take {better.name} for quality ({error} better), "
        f"{smaller.name} for size ({saved})"
    )


def speed_advice(m: Match) -> str:
    """By decode speed beyond noise."""
    margin = max(LEAST_NOISE, m.decode_noise)
    ratio = m.ours.decode / m.rival.decode
    if 1 / (1 + margin) <= ratio <= 1 + margin:
        return f"for speed either: decode differs by less than the noise of ±{margin:.0%}"
    faster = m.ours if ratio > 1 else m.rival
    return f"for speed take {faster.name}: decode {max(ratio, 1 / ratio):.2f}×"
