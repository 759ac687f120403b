"""What a mask looks like: the pattern of a recipe parsed, where its windows are, what its positions cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from losa_deploy.errors import UsageError

WINDOW = 4
"""Positions of a sliding window."""
WIDEST_STRIDE = 3
"""Above it the last window of a row may end before the row does."""


@dataclass(frozen=True)
class Structure:
    """One pattern. Unstructured: no field is set.

    N:M: `kept` of every `group` positions. `sliding`: slot j of a row keeps one position of a window
    that moves on by `stride`. `pair`: rows 2 i and 2 i + 1 are `paired`, they have one mask.
    """

    kept: int = 0
    group: int = 0
    stride: Fraction = Fraction(0)
    paired: bool = False

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern fixes, None if the recipe chooses it."""
        if self.group:
            return 1.0 - self.kept / self.group
        return float(1 - 1 / self.stride) if self.stride else None


def parse_structure(text: str) -> Structure:
    """`unstructured`, `pair`, N:M, `sliding` (stride 2) or `sliding:STRIDE`; raises `ValueError`."""
    if text in ("unstructured", "pair"):
        return Structure(paired=text == "pair")
    if match := re.fullmatch(r"sliding(?::(\d{1,4}(?:\.\d{1,4})?))?", text):
        stride = Fraction(match[1] or 2)
        if not 1 < stride <= WIDEST_STRIDE:
            raise ValueError(f"pattern {text!r} needs a stride above 1 and at most {WIDEST_STRIDE}")
        return Structure(stride=stride)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match:
        raise ValueError(
            f"pattern {text!r} is none of 'unstructured', 'pair', 'sliding', 'sliding:2.5' and N:M as '2:4'"
        )
    n, m = int(match[1]), int(match[2])
    if not (1 <= n < m <= 32):
        raise ValueError(f"pattern {text!r} needs 1 <= N < M <= 32 (N kept of every M)")
    return Structure(kept=n, group=m)


@lru_cache(maxsize=64)
def window_starts(columns: int, stride: Fraction) -> tuple[int, ...]:
    """First position of the window of every slot: floor(stride·j) - 1 for j < columns / stride.

    A window may reach beyond either end of the row; only its positions inside the row count.
    """
    n, d = stride.numerator, stride.denominator
    return tuple(n * j // d - 1 for j in range(-(-columns * d // n)))


@lru_cache(maxsize=64)
def first_slots(columns: int, stride: Fraction) -> tuple[int, ...]:
    """For every position of a row the first slot whose window reaches it."""
    n, d = stride.numerator, stride.denominator
    return tuple(max(0, -((WINDOW - 2 - p) * d // n)) for p in range(columns))


def sparsity_for_bits(structure: Structure, bits: float, value_type: str, group_size: int) -> float:
    """Share of zeros at which a pruned linear takes `bits` per weight.

    Counted are the mask (1 bit per position, half of it for pairs), the kept values, and one f16 scale per
    `group_size` positions of integers below 8 bits; scales per row are left out. Raises `UsageError` for a
    pattern that fixes its bits, and for bits that no sparsity gives, or only one that saves nothing.
    """
    if structure.sparsity is not None:
        raise UsageError(
            f"--bits {bits:g} chooses a sparsity, but this --pattern fixes it: {value_type} values then take "
            f"{fixed_bits(structure, value_type, group_size):.4g} bits per weight.",
            hint="Leave out --bits, or use --pattern unstructured or pair.",
        )
    width, scale = value_bits(value_type, group_size)
    mask = 0.5 if structure.paired else 1.0
    least, dense = mask + scale, width + scale
    if not least < bits < dense:
        raise UsageError(
            f"--bits {bits:g} cannot be reached with {value_type} values: the mask and scales alone take "
            f"{least:g} bits per weight, unpruned weights {dense:g}.",
            hint=f"Give a number between {least:g} and {dense:g}, or another export.value_type.",
        )
    return min(round(1.0 - (bits - least) / width, 6), 1 - 1e-6)


def fixed_bits(structure: Structure, value_type: str, group_size: int) -> float:
    """Bits per weight of N:M or sliding windows, without scales per row.

    Sliding windows take two bits for the position of each kept value, N:M what `layouts.choose` finds.
    """
    width, scale = value_bits(value_type, group_size)
    if structure.stride:
        return float((2 + width) / structure.stride) + scale
    from losa_deploy.layouts.nm import position_bits

    n, m = structure.kept, structure.group
    narrow = n / m * width + (n * position_bits(n, m) / m or 1.0) + scale
    # Tiles of N:16 have position codes of 4 bits and pairs of slots, and are taken unless dense is smaller.
    wide = (n + n % 2) / m * (4 + width) + scale
    return wide if m == 16 and value_type.startswith("i") and wide < width + scale else narrow


def value_bits(value_type: str, group_size: int) -> tuple[int, float]:
    """Bits of a value, and of scales per position."""
    width = int(value_type[1:])
    return width, 16 / group_size if value_type.startswith("i") and width < 8 else 0.0
