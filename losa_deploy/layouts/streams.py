"""Value streams: how the kept codes of a sparse layout follow one another.

i8, f16 and f32 are one stream, row after row. i4 has one stream per *pair of rows*: byte k holds the
k-th kept code of the even row in its low nibble and of the odd row in its high nibble. A kernel that
computes two rows at once then reads every byte of both with one load and splits them without a
shuffle, and rows of unequal counts cost only their difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, ValueType
from losa_deploy.layouts.values import code_dtype

ALIGNMENT = 64
"""A stream is padded to a multiple of this many bytes ..."""
SLACK = 64
"""... and followed by so many zero bytes, because a kernel reads one whole register from any kept code."""

Mask = NDArray[np.bool_]


def stream_bytes(counts: NDArray[np.int64], value_type: ValueType) -> int:
    """Stored bytes of rows with these counts of kept codes [out]."""
    if value_type == "i4":
        raw = int(_pair_lengths(counts).sum())
    else:
        raw = int(counts.sum()) * code_dtype(value_type).itemsize
    return -(-raw // ALIGNMENT) * ALIGNMENT + SLACK


def store_stream(codes: NDArray[np.generic], slots: Mask, value_type: ValueType) -> Component:
    """The `values` component [n] of the codes [out, width] that `slots` keeps."""
    counts = np.count_nonzero(slots, axis=1)
    dtype = np.dtype(np.uint8) if value_type == "i4" else code_dtype(value_type)
    values = np.zeros(stream_bytes(counts, value_type) // dtype.itemsize, dtype)
    if value_type != "i4":
        values[: int(counts.sum())] = codes[slots]
        return values
    for odd in (0, 1):
        kept = codes[odd::2][slots[odd::2]].astype(np.uint8)
        values[_pair_positions(counts, odd)] |= kept << np.uint8(4 * odd)
    return values


def load_stream(values: Component, slots: Mask, value_type: ValueType) -> NDArray[np.generic]:
    """Inverse of `store_stream`: codes [out, width], zero where `slots` keeps nothing."""
    counts = np.count_nonzero(slots, axis=1)
    codes = np.zeros(slots.shape, code_dtype(value_type))
    if value_type != "i4":
        codes[slots] = values[: int(counts.sum())]
        return codes
    stream = values.astype(np.uint8)
    for odd in (0, 1):
        kept = (stream[_pair_positions(counts, odd)] >> np.uint8(4 * odd)) & np.uint8(15)
        codes[odd::2][slots[odd::2]] = kept
    return codes


def _pair_lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of rows [out] → bytes of the stream of each pair of rows [ceil(out / 2)]."""
    odd = np.zeros_like(counts[0::2])
    odd[: len(counts) // 2] = counts[1::2]
    lengths: NDArray[np.int64] = np.maximum(counts[0::2], odd)
    return lengths


def _pair_positions(counts: NDArray[np.int64], odd: int) -> NDArray[np.int64]:
    """Byte of each kept code of the even (0) or odd (1) rows, in row order."""
    lengths = _pair_lengths(counts)
    starts = (np.cumsum(lengths) - lengths)[: len(counts[odd::2])]
    mine = counts[odd::2]
    first = np.cumsum(mine) - mine
    positions: NDArray[np.int64] = np.arange(int(mine.sum())) + np.repeat(starts - first, mine)
    return positions
