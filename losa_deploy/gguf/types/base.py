"""What every type of ggml shares: rows of whole blocks, each some weights in some bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Known = TypeVar("Known", bound="GgmlType")
Encode = Callable[[NDArray[np.generic], NDArray[np.float16] | None], NDArray[np.uint8]]
"""Values, or levels, [out, in] and their scales → bytes [out, bytes of a row].

Scales are [out, blocks], or [out, 1] where all blocks of a row share one, and None for types without scales.
"""
Decode = Callable[[bytes], NDArray[np.float32]]
"""Bytes of whole blocks → their weights, flat: level times scale, one f32 product each."""


@dataclass(frozen=True)
class GgmlType:
    """One of ggml's tensor types: what its tensors take."""

    id: int
    """ggml's number."""
    name: str
    weights: int
    """Of a block."""
    block_bytes: int

    def fits(self, columns: int) -> bool:
        """True if rows of so many weights are whole blocks."""
        return columns % self.weights == 0

    def nbytes(self, count: int) -> int:
        """Bytes of `count` weights in rows of whole blocks."""
        return count // self.weights * self.block_bytes


@dataclass(frozen=True)
class WeightType(GgmlType):
    """A type that weights are written as and read from."""

    encode: Encode
    decode: Decode


TYPES: dict[int, GgmlType] = {}
"""ggml's number → type, of those that our files hold; filled where each is defined."""


def register(kind: Known) -> Known:
    """Add a type to `TYPES`; called once at the end of the file that defines it."""
    TYPES[kind.id] = kind
    return kind


def own_type(number: int) -> GgmlType:
    """The type of a number; `ValueError` naming those that our files hold if it is none of them."""
    if number not in TYPES:
        names = ", ".join(kind.name for kind in TYPES.values())
        raise ValueError(f"type {number}, expected one of {names}")
    return TYPES[number]


def any_type(number: int) -> GgmlType:
    """One of our types, or name and size of another from the tables of the `gguf` package.

    `ValueError` for a number that ggml does not use.
    """
    if number in TYPES:
        return TYPES[number]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"type {number}, which ggml does not have") from None
    weights, size = GGML_QUANT_SIZES[known]
    return GgmlType(number, known.name, weights, size)


def scaled_blocks(scales: NDArray[np.float16], bodies: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows [out, bytes] of blocks that start with an f16 scale; bodies are [out, blocks, bytes of one]."""
    rows, blocks, size = bodies.shape
    result = np.empty((rows, blocks, 2 + size), np.uint8)
    result[..., :2] = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    result[..., 2:] = bodies
    return result.reshape(rows, -1)
