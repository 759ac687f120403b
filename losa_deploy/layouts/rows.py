"""Dense rows: one code per position, those below 8 bits in planes.

A row is cut into blocks of 128 positions. A plane of `bits` bits puts 8 / bits positions of a block into a
byte: of a block of n positions and w = ceil(n * bits / 8) bytes, byte j holds position j in its lowest bits,
then j + w, j + 2 w ... A kernel so splits a block into runs of positions without a shuffle. The planes of a
block follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component
from losa_deploy.layouts.values import ValueType

BLOCK = 128
"""Positions that share bytes: of i4 64 bytes, the first half low nibbles, the second high ones."""


def row_bytes(columns: int, kind: ValueType) -> int:
    """Stored bytes of a row."""
    if kind.bits >= 8:
        return columns * kind.bits // 8
    whole, rest = divmod(columns, BLOCK)
    return whole * BLOCK * kind.bits // 8 + sum(-(-rest * bits // 8) for bits in kind.planes)


def store_rows(codes: NDArray[np.generic], kind: ValueType) -> Component:
    """Codes [out, in] → the dense `values` component: [out, in], or [out, row bytes] below 8 bits."""
    if kind.bits >= 8:
        return np.ascontiguousarray(codes)
    narrow: NDArray[np.uint8] = codes.astype(np.uint8)
    packed = np.zeros((codes.shape[0], row_bytes(codes.shape[1], kind)), np.uint8)
    for run in _runs(codes.shape[1], kind):
        packed[:, run.into] |= (narrow[:, run.positions] >> run.low & run.ones) << run.shift
    return packed


def load_rows(values: Component, kind: ValueType, columns: int) -> NDArray[np.generic]:
    """Inverse of `store_rows`."""
    if kind.bits >= 8:
        return values
    codes, packed = np.zeros((values.shape[0], columns), np.uint8), values.astype(np.uint8)
    for run in _runs(columns, kind):
        codes[:, run.positions] |= (packed[:, run.into] >> run.shift & run.ones) << run.low
    return codes


class _Run:
    """Neighbouring positions whose bits of one plane lie in neighbouring bytes."""

    def __init__(self, start: int, count: int, byte: int, bits: int, *, shift: int, low: int) -> None:
        self.positions = slice(start, start + count)
        self.into = slice(byte, byte + count)
        self.ones, self.shift, self.low = np.uint8((1 << bits) - 1), np.uint8(shift), np.uint8(low)


def _runs(columns: int, kind: ValueType) -> Iterator[_Run]:
    byte = 0
    for start in range(0, columns, BLOCK):
        count, low = min(BLOCK, columns - start), 0
        for bits in kind.planes:
            width = -(-count * bits // 8)
            for part in range(8 // bits):
                here = min(width, count - part * width)
                if here > 0:
                    yield _Run(start + part * width, here, byte, bits, shift=part * bits, low=low)
            byte, low = byte + width, low + bits
