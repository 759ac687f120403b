"""Value streams: how the kept codes of a sparse layout follow one another.

Codes of 8 bits and more are one stream, row after row. Codes of several planes are row after row too, each
row stored as a dense one of as many positions as it keeps. Of other codes there is one stream per
*8 / bits rows*, of i4 per pair of rows: byte k holds the k-th kept code of each of them, that of the first
row in the lowest bits. A kernel that computes two rows at once then reads every byte of both with one load
and splits them without a shuffle, and rows of unequal counts cost only their difference.

Rows that share their mask in pairs (`paired`) keep as many codes each. Where codes have several planes, such
a pair is one dense row: of every block of 128 codes the first half belongs to the even row, the second to the
odd one, so that a kernel unpacks both into the nibbles of one byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackedTensor
from losa_deploy.layouts.rows import BLOCK, load_rows, row_bytes, store_rows
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

ALIGNMENT = 64
"""A stream is padded to a multiple of this many bytes ..."""
SLACK = 64
"""... and followed by so many zero bytes, because a kernel reads one whole register from any kept code."""
FILLED = 4
"""Codes of a row of a pair in planes are filled up to a multiple of this, so that planes have whole bytes."""

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]


def rows_together(kind: ValueType, *, paired: bool = False) -> int:
    """Rows that share the bytes of a stream."""
    if len(kind.planes) > 1:
        return 2 if paired else 1
    return 1 if kind.bits >= 8 else 8 // kind.bits


def used_bytes(counts: Counts, kind: ValueType, *, paired: bool = False) -> int:
    """Bytes of the codes of rows with these counts [out], without padding."""
    if kind.bits >= 8:
        return int(counts.sum()) * kind.bits // 8
    if len(kind.planes) > 1:
        return int(_block_bytes(_blocks(_pair_lengths(counts) if paired else counts), kind).sum())
    return int(_lengths(counts, rows_together(kind)).sum())


def stream_bytes(counts: Counts, kind: ValueType, *, paired: bool = False) -> int:
    """Stored bytes of rows with these counts of kept codes [out]."""
    return -(-used_bytes(counts, kind, paired=paired) // ALIGNMENT) * ALIGNMENT + SLACK


def store_stream(
    codes: NDArray[np.generic], slots: Mask, kind: ValueType, *, paired: bool = False
) -> Component:
    """The `values` component [n] of the codes [out, width] that `slots` keeps."""
    counts = np.count_nonzero(slots, axis=1)
    values = np.zeros(stream_bytes(counts, kind, paired=paired) // kind.stored.itemsize, kind.stored)
    if kind.bits >= 8:
        values[: int(counts.sum())] = codes[slots]
        return values
    if len(kind.planes) > 1:
        lengths, in_order = (
            (_pair_lengths(counts), _pairs_in_order(codes, slots)) if paired else (counts, codes[slots])
        )
        for length, ordinals, places in _blocks_by_length(lengths, kind):
            values[places] = store_rows(in_order[ordinals].reshape(-1, length), kind)
        return values
    rows = rows_together(kind)
    for row in range(rows):
        kept = codes[row::rows][slots[row::rows]].astype(np.uint8)
        values[_places(counts, row, rows)] |= kept << np.uint8(kind.bits * row)
    return values


def load_stream(
    values: Component, slots: Mask, kind: ValueType, *, paired: bool = False
) -> NDArray[np.generic]:
    """Inverse of `store_stream`: codes [out, width], zero where `slots` keeps nothing."""
    counts = np.count_nonzero(slots, axis=1)
    codes = np.zeros(slots.shape, kind.code)
    if kind.bits >= 8:
        codes[slots] = values[: int(counts.sum())]
        return codes
    if len(kind.planes) > 1:
        lengths = _pair_lengths(counts) if paired else counts
        found = np.zeros(int(lengths.sum()), kind.code)
        for length, ordinals, places in _blocks_by_length(lengths, kind):
            found[ordinals] = load_rows(values[places], kind, length)
        if not paired:
            codes[slots] = found
            return codes
        for row in range(2):
            codes[row::2][slots[row::2]] = found[_pair_ordinals(counts, row)]
        return codes
    stream, rows, ones = values.astype(np.uint8), rows_together(kind), np.uint8((1 << kind.bits) - 1)
    for row in range(rows):
        kept = stream[_places(counts, row, rows)] >> np.uint8(kind.bits * row) & ones
        codes[row::rows][slots[row::rows]] = kept
    return codes


def _pair_lengths(counts: Counts) -> Counts:
    """Counts of rows [out], equal in a pair → codes of each pair with what fills them up [ceil(out / 2)]."""
    lengths: Counts = 2 * (-(-counts[::2] // FILLED) * FILLED)
    return lengths


def _pair_ordinals(counts: Counts, row: int) -> Counts:
    """Where the kept codes of all even (0) or odd (1) rows come in the codes of the pairs, in row order."""
    lengths, mine = _pair_lengths(counts), counts[row::2]
    starts, lengths = (np.cumsum(lengths) - lengths)[: len(mine)], lengths[: len(mine)]
    number = np.arange(int(mine.sum())) - np.repeat(np.cumsum(mine) - mine, mine)
    half = BLOCK // 2
    block = number // half
    width = np.minimum(half, np.repeat(lengths // 2, mine) - block * half)
    ordinals: Counts = np.repeat(starts, mine) + block * BLOCK + row * width + number % half
    return ordinals


def _pairs_in_order(codes: NDArray[np.generic], slots: Mask) -> NDArray[np.generic]:
    """Kept codes of all pairs one after another, a code 0 wherever there is none."""
    counts = np.count_nonzero(slots, axis=1)
    in_order = np.zeros(int(_pair_lengths(counts).sum()), codes.dtype)
    for row in range(2):
        in_order[_pair_ordinals(counts, row)] = codes[row::2][slots[row::2]]
    return in_order


def _blocks(counts: Counts) -> Counts:
    """Counts of rows [out] → codes of each block of up to 128, in the order of the stream."""
    blocks = -(-counts // BLOCK)
    lengths: Counts = np.full(int(blocks.sum()), BLOCK, np.int64)
    there = blocks > 0
    lengths[np.cumsum(blocks)[there] - 1] = (counts - (blocks - 1) * BLOCK)[there]
    return lengths


def _block_bytes(lengths: Counts, kind: ValueType) -> Counts:
    """Bytes of blocks of so many codes."""
    sizes: Counts = np.array([row_bytes(length, kind) for length in range(BLOCK + 1)])[lengths]
    return sizes


def _blocks_by_length(counts: Counts, kind: ValueType) -> Iterator[tuple[int, Counts, Counts]]:
    """For all blocks of one length: the length, the ordinals of their kept codes [blocks, length], and
    their bytes in the stream [blocks, bytes]."""
    lengths = _blocks(counts)
    sizes = _block_bytes(lengths, kind)
    first_codes, first_bytes = np.cumsum(lengths) - lengths, np.cumsum(sizes) - sizes
    for length in np.unique(lengths).tolist():
        here = lengths == length
        ordinals = first_codes[here][:, None] + np.arange(length)
        yield length, ordinals, first_bytes[here][:, None] + np.arange(row_bytes(length, kind))


def _lengths(counts: Counts, rows: int) -> Counts:
    """Counts of rows [out] → bytes of the stream that each `rows` of them share [ceil(out / rows)]."""
    padded = np.zeros(-(-len(counts) // rows) * rows, np.int64)
    padded[: len(counts)] = counts
    lengths: Counts = padded.reshape(-1, rows).max(axis=1, initial=0)
    return lengths


def _places(counts: Counts, row: int, rows: int) -> Counts:
    """Byte of each kept code of the rows that come as number `row` of their stream, in row order."""
    lengths = _lengths(counts, rows)
    starts = (np.cumsum(lengths) - lengths)[: len(counts[row::rows])]
    mine = counts[row::rows]
    first = np.cumsum(mine) - mine
    places: Counts = np.arange(int(mine.sum())) + np.repeat(starts - first, mine)
    return places


def check_stream(packed: PackedTensor, counts: Counts, *, paired: bool = False) -> None:
    """Raise `ValueError` if the values are not as many bytes as rows with these counts [out] need."""
    expected = stream_bytes(counts, VALUE_TYPES[packed.value_type], paired=paired)
    found = packed.arrays["values"].nbytes if "values" in packed.arrays else 0
    if found != expected:
        raise ValueError(f"the component values has {found} bytes, the mask needs {expected}")
