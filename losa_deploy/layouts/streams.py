"""Value streams: how the kept codes of a sparse layout follow one another.

Codes of 8 bits and more are one stream, row after row. Below, there is one stream per *8 / bits rows*, of i4
per pair of rows: byte k holds the k-th kept code of each of them, that of the first row in the lowest bits.
A kernel that computes two rows at once then
reads every byte of both with one load and splits them without a shuffle, and rows of unequal counts cost
only their difference.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackedTensor
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

ALIGNMENT = 64
"""A stream is padded to a multiple of this many bytes ..."""
SLACK = 64
"""... and followed by so many zero bytes, because a kernel reads one whole register from any kept code."""

Mask = NDArray[np.bool_]


def streams(kind: ValueType) -> bool:
    """Whether codes of this type can be a stream: those of several planes have none yet."""
    return len(kind.planes) == 1


def used_bytes(counts: NDArray[np.int64], kind: ValueType) -> int:
    """Bytes of the codes of rows with these counts [out], without padding."""
    if kind.bits >= 8:
        return int(counts.sum()) * kind.bits // 8
    return int(_lengths(counts, 8 // kind.bits).sum())


def stream_bytes(counts: NDArray[np.int64], kind: ValueType) -> int:
    """Stored bytes of rows with these counts of kept codes [out]."""
    return -(-used_bytes(counts, kind) // ALIGNMENT) * ALIGNMENT + SLACK


def store_stream(codes: NDArray[np.generic], slots: Mask, kind: ValueType) -> Component:
    """The `values` component [n] of the codes [out, width] that `slots` keeps."""
    counts = np.count_nonzero(slots, axis=1)
    values = np.zeros(stream_bytes(counts, kind) // kind.stored.itemsize, kind.stored)
    if kind.bits >= 8:
        values[: int(counts.sum())] = codes[slots]
        return values
    rows = 8 // kind.bits
    for row in range(rows):
        kept = codes[row::rows][slots[row::rows]].astype(np.uint8)
        values[_places(counts, row, rows)] |= kept << np.uint8(kind.bits * row)
    return values


def load_stream(values: Component, slots: Mask, kind: ValueType) -> NDArray[np.generic]:
    """Inverse of `store_stream`: codes [out, width], zero where `slots` keeps nothing."""
    counts = np.count_nonzero(slots, axis=1)
    codes = np.zeros(slots.shape, kind.code)
    if kind.bits >= 8:
        codes[slots] = values[: int(counts.sum())]
        return codes
    stream, rows, ones = values.astype(np.uint8), 8 // kind.bits, np.uint8((1 << kind.bits) - 1)
    for row in range(rows):
        kept = stream[_places(counts, row, rows)] >> np.uint8(kind.bits * row) & ones
        codes[row::rows][slots[row::rows]] = kept
    return codes


def _lengths(counts: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Counts of rows [out] → bytes of the stream that each `rows` of them share [ceil(out / rows)]."""
    padded = np.zeros(-(-len(counts) // rows) * rows, np.int64)
    padded[: len(counts)] = counts
    lengths: NDArray[np.int64] = padded.reshape(-1, rows).max(axis=1, initial=0)
    return lengths


def _places(counts: NDArray[np.int64], row: int, rows: int) -> NDArray[np.int64]:
    """Byte of each kept code of the rows that come as number `row` of their stream, in row order."""
    lengths = _lengths(counts, rows)
    starts = (np.cumsum(lengths) - lengths)[: len(counts[row::rows])]
    mine = counts[row::rows]
    first = np.cumsum(mine) - mine
    places: NDArray[np.int64] = np.arange(int(mine.sum())) + np.repeat(starts - first, mine)
    return places


def check_stream(packed: PackedTensor, counts: NDArray[np.int64]) -> None:
    """Raise `ValueError` if the values are not as many bytes as rows with these counts [out] need."""
    expected = stream_bytes(counts, VALUE_TYPES[packed.value_type])
    found = packed.arrays["values"].nbytes if "values" in packed.arrays else 0
    if found != expected:
        raise ValueError(f"the component values has {found} bytes, the mask needs {expected}")
