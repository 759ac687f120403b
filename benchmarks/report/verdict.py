"""The verdict of a report: computed from its numbers and from nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from ..rival_verdict import LEAST_NOISE, Match, match_line

CACHE_BYTES = 32_000_000
"""Weights up to here are read from the last-level cache of a usual CPU, not from memory."""


@dataclass(frozen=True)
class Evidence:
    """What the verdict is computed from; sizes in bytes, speeds in tokens per second."""

    value_type: str
    exported_bytes: int
    dense_same_type_bytes: int
    """The same folder with every linear dense in the same value type, computed from shapes."""
    dense_bytes: int
    """The dense baseline on disk."""
    block_bits_per_weight: float
    packed: bool
    """At least one linear is stored without its zeros."""
    runtime: str
    kernels: str
    """Name of the native kernels in use, e.g. `avx2`; empty if the runtime uses none."""
    exported_decode: float
    dense_decode: float | None
    """None if the dense model was not run."""
    decode_noise: float
    """Relative standard deviation of the decode speed, the larger of the two models'."""
    exported_rss: int
    dense_rss: int | None
    dense_perplexity: float | None
    """None if the dense model was not at hand."""
    merged_perplexity: float
    exported_perplexity: float
    merged_perplexity_stderr: float
    dense_missing: str = ""
    """Why it was not run."""
    dense_type: str = "f32"
    """Value type of the dense baseline."""
    dense_runtime: str = ""
    """Where the baseline ran, if not in the same runtime."""
    packed_at_load: bool = False
    """The runtime leaves the zeros of dense weights out when it loads them."""
    rival: Match | None = None
    """Beside llama.cpp's quantization of the dense model; None if that was not measured."""
    rival_missing: str = "switched off"
    """Why it was not."""


class Verdict(BaseModel):
    """`smaller`: than a dense export of the same value type.

    `faster`: decode beyond noise; None if the dense model was not run.
    """

    model_config = ConfigDict(frozen=True)

    smaller: bool
    lines: tuple[str, ...]
    faster: bool | None = None


def decide(evidence: Evidence) -> Verdict:
    """The verdict; pure."""
    smaller = evidence.exported_bytes < min(evidence.dense_same_type_bytes, evidence.dense_bytes)
    margin = max(LEAST_NOISE, evidence.decode_noise)
    dense = evidence.dense_decode
    faster = None if dense is None else evidence.exported_decode > dense * (1 + margin)
    lines = (
        size_line(evidence, smaller),
        speed_line(evidence, margin),
        memory_line(evidence),
        quality_line(evidence),
        rival_line(evidence),
    )
    return Verdict(smaller=smaller, faster=faster, lines=lines)


def size_line(e: Evidence, smaller: bool) -> str:
    """Against a dense export of the same value type, and against the dense baseline."""
    same, baseline = e.exported_bytes / e.dense_same_type_bytes, e.exported_bytes / e.dense_bytes
    numbers = (
        f"{megabytes(e.exported_bytes)}, {same:.2f}× a dense {e.value_type} export "
        f"({megabytes(e.dense_same_type_bytes)}), {baseline:.2f}× the dense {e.dense_type} one "
        f"({megabytes(e.dense_bytes)})"
    )
    if smaller:
        return f"Smaller: {numbers}."
    if e.exported_bytes == e.dense_same_type_bytes:
        return f"Not smaller than dense {e.value_type}: {numbers}; every linear is stored dense."
    return (
        f"Not smaller: {numbers}; at this sparsity the positions of the kept weights cost as much as "
        "the dropped ones save."
    )


def speed_line(e: Evidence, margin: float) -> str:
    """Decode speed, and the reason where it is not faster."""
    if e.dense_decode is None:
        return (
            f"Speed: decode {e.exported_decode:.1f} tokens/s. The dense model was not run: {e.dense_missing}."
        )
    ratio = e.exported_decode / e.dense_decode
    numbers = (
        f"decode {e.exported_decode:.1f} against {e.dense_decode:.1f} tokens/s dense {e.dense_type} "
        f"in {e.dense_runtime or e.runtime} ({ratio:.2f}×, noise ±{margin:.0%})"
    )
    if ratio > 1 + margin:
        return f"Faster: {numbers}."
    word = "Slower" if ratio < 1 - margin else "Not faster"
    return f"{word} here: {numbers}. {speed_reason(e)}"


def speed_reason(e: Evidence) -> str:
    """Why sparse weights do not decode faster in this runtime."""
    if not e.packed and not e.packed_at_load:
        return "Every linear is stored dense, so decode reads its zeros like any other weight."
    if e.dense_bytes <= CACHE_BYTES:
        return (
            f"The dense model has {megabytes(e.dense_bytes)} and stays in the CPU's caches, so that "
            "reading fewer bytes saves no time."
        )
    if not e.packed:
        return "Its weights are packed when they are loaded; the kernels, not the memory, limit this CPU."
    if e.kernels and e.dense_decode is not None:
        ours, dense = e.exported_bytes * e.exported_decode / 1e9, e.dense_bytes * e.dense_decode / 1e9
        rates = (
            f"reads {ours:.1f} GB/s of weights with the {e.kernels} kernels, the dense one {dense:.1f} GB/s"
        )
        if ours < dense:
            return f"This model {rates}: the kernels are bound by computing on this CPU, not by reading."
        return "This model has no fewer bytes to read than the dense one."
    return f"The runtime {e.runtime} expands packed weights when it loads them and computes with dense ones."


def memory_line(e: Evidence) -> str:
    """Peak resident memory of a fresh process."""
    if e.dense_rss is None:
        return f"Memory: peak {megabytes(e.exported_rss)}."
    ratio = e.exported_rss / e.dense_rss
    word = "Less" if ratio < 1 - LEAST_NOISE else "More" if ratio > 1 + LEAST_NOISE else "As much"
    against = f"{megabytes(e.dense_rss)} dense {e.dense_type}"
    return f"{word} memory: peak {megabytes(e.exported_rss)} against {against}."


def quality_line(e: Evidence) -> str:
    """What sparsity cost, and what the value type added."""
    change = e.exported_perplexity / e.merged_perplexity - 1
    merged = f"{e.merged_perplexity:.2f} ± {e.merged_perplexity_stderr:.2f} merged"
    exported = f"{e.exported_perplexity:.2f} exported ({change:+.1%} from {e.value_type})"
    if e.dense_perplexity is None:
        return f"Quality: perplexity {merged}, {exported}; the dense model was not at hand to compare."
    cost = e.merged_perplexity / e.dense_perplexity
    return f"Quality: perplexity {e.dense_perplexity:.2f} dense, {merged} ({cost:.2f}×), {exported}."


def rival_line(e: Evidence) -> str:
    """Beside what people would run otherwise, if this run measured that; else nothing is said of it."""
    if e.rival is not None:
        return match_line(e.rival)
    return (
        f"A dense 4-bit file of the same model: not measured, {e.rival_missing}. Blocks here take "
        f"{e.block_bits_per_weight:.2f} bits per weight."
    )


def megabytes(count: int) -> str:
    """Bytes as decimal megabytes."""
    return f"{count / 1e6:.1f} MB"
