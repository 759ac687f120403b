"""Which mask pattern runs fastest on which kernels, and why.

A mask without a pattern loses the least quality at a given sparsity, but needs an instruction that puts
packed values where the mask has ones. Where there is none, integers are fastest in tiles, whose slots a byte
shuffle reads, and floats in N:8, where no kernel has to count mask bits. On one core of an AVX2 machine
(`losa-deploy bench kernels --layouts bitmask,4:8,sliding --value-types f16,i4 --sparsity 0.5 --targets
avx2,scalar --tokens 1 --threads 1 --seconds 25`), a bitmask of half of i4 weights took 3.9 times as long as
sliding windows, and one of f16 1.1 times as long as 4:8; in scalar code, sliding windows took 1.8 times as
long as a bitmask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from losa_deploy.errors import UsageError
from losa_deploy.layouts import VALUE_TYPES, tiled
from losa_deploy.structure import fixed_bits, parse_structure, value_bits

NO_PATTERN = "unstructured"
FURTHEST = 1 / 16
"""How far a pattern may be from the wanted sparsity: one position of 16."""
GROUP = 8
"""Positions of which floats keep N: a byte of the mask."""


@dataclass(frozen=True)
class Kernels:
    """What decides between patterns on one target."""

    any_integers: bool
    any_floats: bool
    """Whether a mask without a pattern is as fast as any."""
    why: str
    """Completes a sentence that begins with the name."""


TARGETS: Mapping[str, Kernels] = {
    "avx2": Kernels(False, False, "has no instruction that expands masks"),
    "avxvnni": Kernels(False, False, "has no instruction that expands masks"),
    "avx512f": Kernels(False, True, "expands masks of floats only (no VBMI2)"),
    "avx512vnni": Kernels(True, True, "expands masks with one instruction (VBMI2)"),
    "neon": Kernels(False, False, "has no instruction that expands masks"),
    "scalar": Kernels(True, True, "gains nothing by a pattern"),
}
"""By the names that `doctor` shows and LOSA_KERNELS takes."""
BEST_AVX512 = {"avx512": "avx512vnni"}


@dataclass(frozen=True)
class Pick:
    """The pattern to prune in, as `sparsity.pattern` of a recipe, and why."""

    target: str
    pattern: str
    reason: str


@dataclass(frozen=True)
class Candidate:
    """A pattern, the share of zeros that it fixes, and stored bits per weight."""

    pattern: str
    sparsity: float
    bits: float


def fastest(
    target: str, value_type: str, group_size: int, sparsity: float, bits: float | None = None
) -> Pick:
    """The pattern that runs fastest on `target`: the nearest to a sparsity, or to `bits` per weight if given.

    Raises `UsageError` for an unknown target, and if no such pattern is near the sparsity.
    """
    name, kind = BEST_AVX512.get(target, target), VALUE_TYPES[value_type]
    if name not in TARGETS:
        raise UsageError(
            f"There are no kernels {target!r}; known: {', '.join((*TARGETS, *BEST_AVX512))}.",
            hint="Give --kernels one of them.",
        )
    kernels = TARGETS[name]
    if kernels.any_integers if kind.bits <= 8 else kernels.any_floats:
        return Pick(name, NO_PATTERN, f"{name} {kernels.why}, and masks without a pattern lose least quality")
    found = candidates(value_type, group_size)
    best = min(found, key=lambda c: abs(c.sparsity - sparsity if bits is None else c.bits - bits))
    if bits is None and abs(best.sparsity - sparsity) > FURTHEST:
        offered = ", ".join(f"{c.sparsity:g} ({c.pattern})" for c in found)
        raise UsageError(
            f"No pattern that is fast on {name} has a sparsity of {sparsity:g} in {value_type}: "
            f"there are {offered}.",
            hint="Give --sparsity one of these.",
        )
    kept = "in tiles" if kind.bits <= 8 else f"that keeps N of {GROUP}"
    cost = f"{best.sparsity:.4g} of the weights zero, {best.bits:.4g} bits per weight"
    reason = f"{name} {kernels.why}, and this is the nearest pattern {kept} ({cost})"
    dense = dense_instead(value_type, group_size, best.bits)
    if dense:
        reason += (
            f"; {dense} without zeros takes no more bits, so compare the two "
            f"(--sparsity 0 --value-type {dense})"
        )
    return Pick(name, best.pattern, reason)


def dense_instead(value_type: str, group_size: int, bits: float) -> str | None:
    """The widest narrower integers of which all weights take no more than `bits` each."""
    found = [
        (kind.bits, name)
        for name, kind in VALUE_TYPES.items()
        if name.startswith("i") and kind.bits < VALUE_TYPES[value_type].bits
        if sum(value_bits(name, group_size)) <= bits
    ]
    return max(found)[1] if found else None


def candidates(value_type: str, group_size: int) -> list[Candidate]:
    """Patterns for kernels that expand no masks, the one that keeps most first.

    None takes more bits than one that keeps as many, as 8:16 would beside sliding windows.
    """
    kind = VALUE_TYPES[value_type]
    patterns = [f"{n}:{GROUP}" for n in range(1, GROUP)]
    if kind.bits <= 8:
        wide = [f"{n}:{tiled.WIDE}" for n in range(1, tiled.WIDE) if tiled.saves(kind, n)]
        patterns = ["sliding", *(wide if tiled.holds(kind, tiled.WIDE) else ["1:4"])]
    found: list[Candidate] = []
    for candidate in sorted(
        (_candidate(pattern, value_type, group_size) for pattern in patterns),
        key=lambda c: (c.sparsity, c.bits),
    ):
        if not found or candidate.bits <= found[-1].bits:
            found.append(candidate)
    return found


def _candidate(pattern: str, value_type: str, group_size: int) -> Candidate:
    structure = parse_structure(pattern)
    assert structure.sparsity is not None
    return Candidate(pattern, structure.sparsity, fixed_bits(structure, value_type, group_size))
