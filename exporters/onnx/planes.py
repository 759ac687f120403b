"""Streams of codes in several planes, decoded with standard operators: rows of unequal lengths in bytes.

All but the last block of a row look the same, and so do their bytes. Only what the last one holds depends on
how many codes it has; it is decoded apart, 128 codes of every row, and put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from losa_deploy.layouts.rows import BLOCK
from losa_deploy.layouts.streams import FILLED
from losa_deploy.layouts.values import ValueType

from .body import Body

I32, I64 = onnx.TensorProto.INT32, onnx.TensorProto.INT64


def levels_of_pairs(body: Body, kind: ValueType, counts: str) -> str:
    """Kept codes per row, equal in a pair, int64 [out, 1] → levels [out, width], as `levels_of_rows`.

    A pair is stored as one row: blocks have 64 codes of the even row, then 64 of the odd one.
    """
    rows, half, two = body.size(counts, 0), body.ints(BLOCK // 2), body.ints(2)
    of_pairs = body.op("Slice", counts, body.ints(0), rows, body.ints(0), two)
    filled = body.op("Div", body.op("Add", of_pairs, body.ints(FILLED - 1)), body.ints(FILLED))
    lengths = body.op("Mul", filled, body.ints(2 * FILLED))
    levels = levels_of_rows(body, kind, lengths, paired=True)
    pairs, width = body.size(levels, 0), body.op("Div", body.size(levels, 1), two)
    split = body.reshape(levels, pairs, body.ints(-1), two, half)
    by_row = body.reshape(body.op("Transpose", split, perm=[0, 2, 1, 3]), body.ints(-1), width)
    return body.head(by_row, rows, 0)


def levels_of_rows(body: Body, kind: ValueType, counts: str, *, paired: bool = False) -> str:
    """Kept codes per row, int64 [out, 1] → levels [out, width], those of a row first in its line.

    `width` is a multiple of 128 and larger than any count. Behind the levels of a row lies anything. Of
    `paired` ones the second half of the codes of the last block is put at its 64th place.
    """
    count, one, block = body.ints(BLOCK), body.ints(1), body.ints(BLOCK * kind.bits // 8)
    whole, rest = body.op("Div", counts, count), body.op("Mod", counts, count)
    last = [_plane_bytes(body, rest, bits) for bits in kind.planes]
    before = body.op("Mul", whole, block)
    sizes = before
    for size in last:
        sizes = body.op("Add", sizes, size)
    starts = body.op("CumSum", sizes, body.const(np.array(0, np.int64)), exclusive=1)
    blocks = body.op("Add", body.op("ReduceMax", body.reshape(whole, body.ints(-1)), keepdims=1), one)
    number = _range(body, blocks)
    firsts = body.op("Add", starts, body.op("Mul", number, block))
    codes = _whole_blocks(body, kind, body.op("Unsqueeze", firsts, body.ints(2)))
    first = body.op("Add", starts, before)
    tail = body.op("Unsqueeze", _last_blocks(body, kind, first, last, rest if paired else ""), one)
    is_last = body.op("Unsqueeze", body.op("Equal", number, whole), body.ints(2))
    codes = body.cast(body.op("Where", is_last, tail, codes), I32)
    levels = body.op("Gather", body.part("table"), codes, axis=0)
    return body.reshape(levels, body.size(counts, 0), body.op("Mul", blocks, count))


def _range(body: Body, count: str) -> str:
    """0, 1, 2, ... as int64 [count]."""
    zero, one = (body.const(np.array(number, np.int64)) for number in (0, 1))
    return body.op("Range", zero, body.scalar(count), one)


def _plane_bytes(body: Body, codes: str, bits: int) -> str:
    """Bytes of a plane of a block of so many codes."""
    return body.op("Div", body.op("Add", body.op("Mul", codes, body.ints(bits)), body.ints(7)), body.ints(8))


def _whole_blocks(body: Body, kind: ValueType, firsts: str) -> str:
    """First byte of each block [out, blocks, 1] → its codes as of a whole one, uint8 [out, blocks, 128]."""
    planes, at, low = [], 0, 0
    shape = body.op("Shape", firsts, end=2)
    for bits in kind.planes:
        width = BLOCK * bits // 8
        places = body.op("Add", firsts, body.const(np.arange(at, at + width, dtype=np.int64)))
        found = body.op("Gather", body.const(_codes_of_bytes(bits, low)), _bytes_at(body, places), axis=0)
        runs = body.op("Transpose", found, perm=[0, 1, 3, 2])
        planes.append(body.reshape(runs, shape, body.ints(BLOCK)))
        at, low = at + width, low + bits
    return _joined(body, planes)


def _last_blocks(body: Body, kind: ValueType, first: str, sizes: Sequence[str], halved: str) -> str:
    """First byte [out, 1] of the last block of each row, bytes of its planes → codes uint8 [out, 128].

    `halved` is empty, or how many codes the block has, of which each half gets half of the places.
    """
    number, one = body.const(np.arange(BLOCK, dtype=np.int64)), body.ints(1)
    if halved:
        half = body.ints(BLOCK // 2)
        second = body.op("Mul", body.op("Div", number, half), body.op("Div", halved, body.ints(2)))
        number = body.op("Add", body.op("Mod", number, half), second)
    planes, low = [], 0
    for bits, size in zip(kind.planes, sizes, strict=True):
        width = body.op("Max", size, one)  # none where a row ends with a whole block
        per_byte = body.ints(8 // bits)
        run = body.op("Min", body.op("Div", number, width), body.op("Sub", per_byte, one))
        byte = _bytes_at(body, body.op("Add", first, body.op("Mod", number, width)))
        index = body.op("Add", body.op("Mul", body.cast(byte, I64), per_byte), run)
        planes.append(body.op("Gather", body.const(_codes_of_bytes(bits, low).reshape(-1)), index, axis=0))
        first, low = body.op("Add", first, size), low + bits
    return _joined(body, planes)


def _codes_of_bytes(bits: int, low: int) -> NDArray[np.uint8]:
    """[256, 8 / bits]: the bits of each code of a byte, shifted to their place in a code."""
    parts = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    return (parts << low).astype(np.uint8)


def _bytes_at(body: Body, places: str) -> str:
    """Bytes of the stream as int32. Places behind its end read the last byte, which belongs to no code."""
    values = body.part("values")
    end = body.op("Sub", body.size(values, 0), body.ints(1))
    return body.cast(body.op("Gather", values, body.op("Min", places, end), axis=0), I32)


def _joined(body: Body, planes: Sequence[str]) -> str:
    total = planes[0]
    for plane in planes[1:]:
        total = body.op("BitwiseOr", total, plane)
    return total
