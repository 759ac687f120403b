"""The operators of domain `ai.losa`, each defined by a model-local function of standard operators.

One operator per layout and value type. A runtime with our library replaces the node by a kernel;
any other inlines the function, folds the decoding of the constant inputs at load and is left with
an ordinary MatMul. The bodies are chosen for what ONNX Runtime's constant folding does: it keeps
every intermediate until the whole graph is folded, skips operators with data-dependent output
shapes (NonZero, Compress), and is fast for GatherElements but not for Gather of single elements.
So positions become one 32-bit index each, and values stay 8 or 16 bits wide until the last step.
A DequantizeLinear at the end would be fused into ONNX Runtime's own integer MatMul, which is fast and
keeps the weight narrow, but rounds the activations to int8 unless the session says otherwise: the
logits would not be those of the stored weights. So the scales are applied in f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from losa_deploy.layouts import sliding
from losa_deploy.layouts.base import PackedTensor
from losa_deploy.layouts.operator_names import DOMAIN, attributes, form, op_type
from losa_deploy.layouts.rows import BLOCK as ROW_BLOCK
from losa_deploy.layouts.steps import STEP, TILE
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

from .body import Body
from .planes import levels_of_pairs, levels_of_rows

VERSION = 1
OPSET = 20
"""Version of the standard operators that the bodies use."""
BLOCK = 8
"""Levels per block in the bitmask decoding."""
F32, I32, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
U8 = onnx.TensorProto.UINT8


def function(
    packed: PackedTensor, weights: int = 1, *, gated: bool = False, unpadded: bool = False
) -> onnx.FunctionProto:
    """The function that defines the operator of `packed`: Y[..., out] = X[..., in] @ W.T.

    With several weights the components are numbered (`values0`, `values1`), and so are the outputs.
    `gated` makes one output of two weights: SiLU(Y0) * Y1. `unpadded` promises that every tensor of the model
    that uses it is unpadded.
    """
    body, name, kind = Body(), op_type(packed, weights, gated=gated), VALUE_TYPES[packed.value_type]
    inputs, outputs = ["X"], []
    for index in range(weights):
        body.suffix = str(index) if weights > 1 else ""
        matrix = DECODERS[form(packed)](body, kind, unpadded)
        _finish(body, matrix, packed, unpadded=unpadded)
        inputs += [body.part(part) for part in packed.arrays]
        outputs.append(body.part("Y"))
    if gated:
        outputs = _gate(body, *outputs)
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        DOMAIN, name, inputs, outputs, body.nodes, imports, attributes=list(attributes(packed))
    )


def _levels(body: Body, kind: ValueType) -> str:
    """Stored values → levels of the same shape, or below 8 bits [..., codes of a byte]."""
    if kind.bits >= 8:
        return body.part("values")
    levels = body.op("Gather", body.part("table"), body.const(_codes_of_bytes(kind.bits)), axis=0)
    return body.op("Gather", levels, body.cast(body.part("values"), I32), axis=0)


def _codes_of_bytes(bits: int) -> NDArray[np.int32]:
    """[256, 8 / bits]: the codes of each byte, that in the lowest bits first."""
    byte = np.arange(256, dtype=np.int32)[:, None]
    return byte >> np.arange(0, 8, bits, dtype=np.int32) & (1 << bits) - 1


def _decode_dense(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Levels [out, in], below 8 bits [out, >= in] if `in` is no multiple of 128."""
    if kind.bits >= 8:
        return body.part("values")
    if len(kind.planes) > 1:
        return _decode_planes(body, kind, unpadded)
    levels, count = _levels(body, kind), 8 // kind.bits
    rows, width = body.size(body.part("values"), 0), body.ints(ROW_BLOCK // count)
    blocks = body.op("Div", body.attribute("in_features"), body.ints(ROW_BLOCK))
    full = body.op("Mul", blocks, width)
    if not unpadded:
        rest = body.op("Slice", levels, full, body.size(levels, 1), body.ints(1))
        levels = body.head(levels, full, 1)
    split = body.reshape(levels, rows, blocks, width, body.ints(count))
    split = body.op("Transpose", split, perm=[0, 1, 3, 2])
    whole = body.reshape(split, rows, body.op("Mul", full, body.ints(count)))
    if unpadded:
        return whole
    return body.op("Concat", whole, _flat_runs(body, rest, rows, count), axis=1)


def _flat_runs(body: Body, rest: str, rows: str, count: int) -> str:
    """The short block of each row, [out, bytes, codes of a byte] → [out, positions]."""
    tail = body.op("Transpose", rest, perm=[0, 2, 1])
    width = body.op("Mul", body.size(tail, 2), body.ints(count))
    # Another tensor of the model may have no tail: then the width is zero, and means it.
    return body.op("Reshape", tail, body.op("Concat", rows, width, axis=0), allowzero=1)


def _decode_planes(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Codes whose bits lie in several planes → levels [out, in]."""
    features, values = body.attribute("in_features"), body.part("values")
    rows, block = body.size(values, 0), ROW_BLOCK * kind.bits // 8
    blocks = body.op("Div", features, body.ints(ROW_BLOCK))
    full = body.op("Mul", blocks, body.ints(block))
    last = body.op("Mod", features, body.ints(ROW_BLOCK))
    whole = body.reshape(body.head(values, full, 1), rows, blocks, body.ints(block))
    planes, first, at, low = [], 0, full, 0
    for bits in kind.planes:
        table = body.const(_codes_of_bytes(bits) << low)
        width = ROW_BLOCK * bits // 8
        run = body.op("Slice", whole, body.ints(first), body.ints(first + width), body.ints(2))
        split = body.op("Gather", table, body.cast(run, I32), axis=0)
        split = body.op("Transpose", split, perm=[0, 1, 3, 2])
        plane = body.reshape(split, rows, body.op("Mul", blocks, body.ints(ROW_BLOCK)))
        if not unpadded:
            rounded = body.op("Add", body.op("Mul", last, body.ints(bits)), body.ints(7))
            end = body.op("Add", at, body.op("Div", rounded, body.ints(8)))
            rest = body.cast(body.op("Slice", values, at, end, body.ints(1)), I32)
            tail = _flat_runs(body, body.op("Gather", table, rest, axis=0), rows, 8 // bits)
            plane, at = body.op("Concat", plane, body.head(tail, last, 1), axis=1), end
        planes.append(plane)
        first, low = first + width, low + bits
    return body.op("Gather", body.part("table"), _sum(body, planes), axis=0)


def _sum(body: Body, planes: Sequence[str]) -> str:
    """Codes from their planes, each shifted to its place."""
    total = planes[0]
    for plane in planes[1:]:
        total = body.op("Add", total, plane)
    return total


def _decode_bits(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Mask bits and levels → levels [out, padded in]."""
    del unpadded  # rows end with a word of mask bits, whatever they hold
    return _place(body, kind, body.part("positions"))


def _decode_pairs(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Mask bits of pairs of rows, and levels → levels [out, padded in]; scales tell the number of rows."""
    del unpadded
    masks, rows = body.part("positions"), body.size(body.part("scale"), 0)
    width = body.size(masks, 1)
    shape = body.op("Concat", body.size(masks, 0), body.ints(2), width, axis=0)
    twice = body.op("Expand", body.op("Unsqueeze", masks, body.ints(1)), shape)
    return _place(body, kind, body.head(body.reshape(twice, body.ints(-1), width), rows, 0), paired=True)


def _place(body: Body, kind: ValueType, positions: str, *, paired: bool = False) -> str:
    """Mask bits of every row [out, bytes], and the levels of the stream → levels [out, padded in].

    A mask byte's kept values are a run that starts at `first`; it lies within two neighbouring
    blocks of 8 levels. A table indexed by `first % 8` and the byte says which of the 16 levels
    each of the byte's 8 positions takes, or the zero behind them if it is pruned.
    """
    byte = body.cast(positions, I32)
    bits = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int32)
    kept = body.op("Gather", body.const(bits.sum(axis=1).astype(np.int32)), byte, axis=0)
    if len(kind.planes) > 1:
        levels, first = _levels_by_row(body, kind, positions, kept, paired=paired)
    elif kind.bits < 8:
        levels = body.op("Transpose", _levels(body, kind), perm=[1, 0])  # of i4: first all low nibbles
        first = _first_in_streams(body, positions, kept, body.size(levels, 1), 8 // kind.bits)
    else:
        levels, flat = _levels(body, kind), body.reshape(kept, body.ints(-1))
        first = body.op("CumSum", flat, body.const(np.array(0, np.int64)), exclusive=1)
    first, byte = body.reshape(first, body.ints(-1)), body.reshape(byte, body.ints(-1))
    blocks = body.reshape(levels, body.ints(-1, BLOCK))
    here = body.op("Slice", blocks, body.ints(0), body.ints(-1), body.ints(0))
    after = body.op("Slice", blocks, body.ints(1), body.size(blocks, 0), body.ints(0))
    nothing = body.zeros(kind.level, body.size(here, 0), body.ints(1))
    pairs = body.op("Concat", here, after, nothing, axis=1)
    eight = body.const(np.array(BLOCK, np.int32))
    phase = body.op("Mul", body.op("Mod", first, eight), body.const(np.array(256, np.int32)))
    column = body.op("Gather", body.const(_columns(bits)), body.op("Add", phase, byte), axis=0)
    run = body.op("Gather", pairs, body.op("Div", first, eight), axis=0)
    found = body.op("GatherElements", run, column, axis=1)
    return body.reshape(found, body.size(positions, 0), body.ints(-1))


def _levels_by_row(
    body: Body, kind: ValueType, positions: str, kept: str, *, paired: bool
) -> tuple[str, str]:
    """Bits per mask byte [out, bytes] → levels, flat, and the index of each byte's first one."""
    one, rows = body.ints(1), body.size(positions, 0)
    counts = body.cast(body.op("ReduceSum", kept, one, keepdims=1), I64)
    levels = levels_of_pairs(body, kind, counts) if paired else levels_of_rows(body, kind, counts)
    zero, step = body.const(np.array(0, np.int64)), body.const(np.array(1, np.int64))
    starts = body.op("Mul", body.op("Range", zero, body.scalar(rows), step), body.size(levels, 1))
    inside = body.op("CumSum", kept, body.const(np.array(1, np.int64)), exclusive=1)
    first = body.op("Add", inside, body.reshape(body.cast(starts, I32), body.ints(-1, 1)))
    flat = body.reshape(levels, body.ints(-1))
    return body.op("Concat", flat, body.zeros(kind.level, body.ints(BLOCK)), axis=0), first


def _first_in_streams(body: Body, positions: str, kept: str, length: str, together: int) -> str:
    """Bits per mask byte [out, bytes] → index of each byte's first level.

    `together` rows share a stream. Their levels lie apart: first those of all first rows, `length` of them,
    then those of all second rows, and so on.
    """
    rows, one = body.size(positions, 0), body.ints(1)
    inside = body.op("CumSum", kept, body.const(np.array(1, np.int64)), exclusive=1)
    totals = body.op("ReduceSum", kept, one, keepdims=1)
    missing = body.op("Mod", body.op("Neg", rows), body.ints(together))
    padded = body.op("Pad", totals, body.op("Concat", body.ints(0, 0), missing, body.ints(0), axis=0))
    lengths = body.op("ReduceMax", body.reshape(padded, body.ints(-1, together)), one, keepdims=1)
    start = body.op("CumSum", lengths, body.const(np.array(0, np.int64)), exclusive=1)
    shifts = body.op("Mul", length, body.ints(*range(together)))
    offset = body.op("Add", start, body.cast(shifts, I32))
    return body.op("Add", inside, body.head(body.reshape(offset, body.ints(-1, 1)), rows, 0))


def _columns(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """[8 * 256, 8]: for each phase and mask byte, the column of each position in a pair of blocks."""
    rank = np.cumsum(bits, axis=1) - bits
    phases = np.arange(BLOCK)[:, None, None] + rank[None]
    columns = np.where(bits[None] > 0, phases, 2 * BLOCK)
    return columns.reshape(-1, 8).astype(np.int32)


def _decode_codes(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Position codes and levels → levels [out, groups * M]."""
    rows = body.size(body.part("positions"), 0)
    n, m = body.attribute("n"), body.attribute("m")
    width = body.attribute("position_bits")
    rounded = body.op("Add", body.attribute("in_features"), body.op("Sub", m, body.ints(1)))
    groups = body.op("Div", rounded, m)
    slots = body.op("Mul", groups, n)
    zero, one = body.const(np.array(0, np.int64)), body.const(np.array(1, np.int64))
    shifts = body.cast(body.op("Range", zero, body.const(np.array(8, np.int64)), body.scalar(width)), U8)
    low_bits = body.cast(body.op("Sub", body.op("Pow", body.ints(2), width), body.ints(1)), U8)
    shifted = body.op(
        "BitShift", body.op("Unsqueeze", body.part("positions"), body.ints(-1)), shifts, direction="RIGHT"
    )
    codes = body.reshape(body.op("BitwiseAnd", shifted, low_bits), rows, body.ints(-1))
    codes = body.cast(body.head(codes, slots, 1), I32)
    first = body.op("Mul", body.op("Range", zero, body.scalar(groups), one), m)
    starts = body.reshape(body.cast(first, I32), body.ints(1, -1, 1))
    index = body.reshape(body.op("Add", body.reshape(codes, rows, groups, n), starts), rows, slots)
    levels = _slot_levels(body, kind, rows, slots)
    empty = body.zeros(kind.level, rows, body.op("Mul", groups, m))
    return body.op("ScatterElements", empty, index, levels, axis=1)


def _decode_tiled(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Slots of tiles of N:16 → levels [out, in]."""
    del unpadded  # rows of tiles have no padding
    values = body.part("values")
    low, four = (body.const(np.array(number, np.uint8)) for number in (15, 4))
    both = values if kind.bits == 4 else body.part("positions")
    positions = body.op("BitwiseAnd", both, low)
    high = body.op("BitShift", both, four, direction="RIGHT")
    if kind.bits < 8:
        levels = body.op("Gather", body.part("table"), body.cast(high, I32), axis=0)
    else:
        positions, levels = body.op("Concat", positions, high, axis=3), values
    return _scatter_slots(body, positions, levels, kind.level)


def _decode_quads(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Slots of tiles of 1:4 or 2:4 → levels [out, in]."""
    del unpadded  # rows of tiles have no padding
    groups = body.op("Div", body.attribute("in_features"), body.ints(TILE))
    deep = body.op("Mul", body.attribute("n"), body.ints(2))
    positions, levels = _load_lines(body, kind, groups, deep)
    return _scatter_slots(body, positions, levels, kind.level)


def _decode_sliding(body: Body, kind: ValueType, unpadded: bool) -> str:
    """Slots of sliding windows → levels [out, in]."""
    del unpadded  # rows of tiles have no padding
    features, zero = body.attribute("in_features"), body.const(np.array(0, np.int64))
    groups, used = body.op("Div", features, body.ints(TILE)), body.ints(TILE // sliding.STRIDE)
    places, levels = _load_lines(body, kind, groups, body.ints(sliding.STEPS))
    rows = body.op("Mul", body.size(places, 0), body.ints(TILE))
    flat = body.op("Concat", rows, body.ints(-1), axis=0)
    stride = body.const(np.array(sliding.STRIDE, np.int64))
    starts = body.cast(body.op("Range", zero, body.scalar(features), stride), I32)
    first = body.op("Sub", starts, body.const(np.array(1, np.int32)))
    places = body.reshape(_slots_by_row(body, body.cast(places, I32), rows, used), flat)
    levels = body.reshape(_slots_by_row(body, levels, rows, used), flat)
    empty = body.zeros(kind.level, rows, features)
    return body.op("ScatterElements", empty, body.op("Add", places, first), levels, axis=1)


def _load_lines(body: Body, kind: ValueType, groups: str, deep: str) -> tuple[str, str]:
    """Positions and levels of slots in lines, each [tiles, groups, steps of a group, 32]."""
    count, tiles = body.op("Mul", groups, deep), body.size(body.part("values"), 0)
    shape = body.op("Concat", tiles, groups, deep, body.ints(STEP), axis=0)
    positions = body.head(_split_lines(body, body.part("positions"), 2), count, 1)
    if kind.bits < 8:
        levels = body.op("Gather", body.part("table"), _codes_of_lines(body, kind, count), axis=0)
    else:
        levels = body.part("values")
    return body.reshape(positions, shape), body.reshape(levels, shape)


def _codes_of_lines(body: Body, kind: ValueType, count: str) -> str:
    """Lines of values [tiles, lines, 32] → codes [tiles, count, 32]."""
    values = body.part("values")
    if len(kind.planes) == 1 and 8 // kind.bits == 2:  # two steps are never parted
        return body.cast(_split_lines(body, values, kind.bits), I32)
    planes, at, low = [], body.ints(0), 0
    for bits in kind.planes:
        rounded = body.op("Add", body.op("Mul", count, body.ints(bits)), body.ints(7))
        end = body.op("Add", at, body.op("Div", rounded, body.ints(8)))
        lines = body.op("Slice", values, at, end, body.ints(1))
        codes = body.cast(body.head(_split_lines(body, lines, bits), count, 1), I32)
        planes.append(body.op("Mul", codes, body.const(np.array(1 << low, np.int32))) if low else codes)
        at, low = end, low + bits
    return _sum(body, planes)


def _split_lines(body: Body, lines: str, bits: int) -> str:
    """[tiles, lines, 32] → the steps that share a line, [tiles, lines * 8 / bits, 32]."""
    shifts = body.const(np.arange(0, 8, bits, dtype=np.uint8)[:, None])
    lines = body.op("Unsqueeze", lines, body.ints(2))
    shifted = body.op("BitShift", lines, shifts, direction="RIGHT")
    split = body.op("BitwiseAnd", shifted, body.const(np.array(2**bits - 1, np.uint8)))
    return body.reshape(split, body.size(split, 0), body.ints(-1, STEP))


def _scatter_slots(body: Body, positions: str, levels: str, dtype: np.dtype[np.generic]) -> str:
    """Positions and levels of slots [tiles, in / 16, steps, 32] → levels [out, in]."""
    features, n, m = body.attribute("in_features"), body.attribute("n"), body.attribute("m")
    rows = body.op("Mul", body.size(positions, 0), body.ints(TILE))
    used = body.op("Div", body.op("Mul", n, body.ints(TILE)), m)
    by_group = body.op("Concat", rows, body.op("Div", features, m), n, axis=0)
    positions = body.reshape(_slots_by_row(body, body.cast(positions, I32), rows, used), by_group)
    zero = body.const(np.array(0, np.int64))
    starts = body.cast(body.op("Range", zero, body.scalar(features), body.scalar(m)), I32)
    index = body.op("Add", positions, body.reshape(starts, body.ints(1, -1, 1)))
    flat = body.op("Concat", rows, body.ints(-1), axis=0)
    levels = body.reshape(_slots_by_row(body, levels, rows, used), flat)
    return body.op(
        "ScatterElements", body.zeros(dtype, rows, features), body.reshape(index, flat), levels, axis=1
    )


def _slots_by_row(body: Body, slots: str, rows: str, used: str) -> str:
    """[tiles, groups, steps, 32] → [out, groups, used]; byte 4 i + 2 h + k is slot k of row 8 h + i."""
    split = body.reshape(slots, body.op("Concat", body.op("Shape", slots, end=3), body.ints(8, 2, 2), axis=0))
    ordered = body.op("Transpose", split, perm=[0, 4, 3, 1, 2, 5])
    by_row = body.reshape(ordered, rows, body.size(slots, 1), body.ints(-1))
    return body.head(by_row, used, 2)


def _slot_levels(body: Body, kind: ValueType, rows: str, slots: str) -> str:
    """Stream of a fixed count per row → levels [out, slots]."""
    if len(kind.planes) > 1:
        counts = body.op(
            "Expand", body.reshape(slots, body.ints(1, 1)), body.op("Concat", rows, body.ints(1), axis=0)
        )
        return body.head(levels_of_rows(body, kind, counts), slots, 1)
    levels = _levels(body, kind)
    if kind.bits >= 8:
        return body.reshape(body.head(levels, body.op("Mul", rows, slots), 0), rows, slots)
    count = 8 // kind.bits
    together = body.ints(count)
    streams = body.op("Div", body.op("Add", rows, body.ints(count - 1)), together)
    kept = body.reshape(body.head(levels, body.op("Mul", streams, slots), 0), streams, slots, together)
    by_row = body.op("Transpose", kept, perm=[0, 2, 1])
    return body.head(body.reshape(by_row, body.op("Mul", streams, together), slots), rows, 0)


def _finish(body: Body, matrix: str, packed: PackedTensor, *, unpadded: bool) -> None:
    """Levels [out, >= in] → Y. Row scales are applied to the product, which costs no memory."""
    features, kind = body.attribute("in_features"), VALUE_TYPES[packed.value_type]
    weight = body.op("Transpose", matrix, perm=[1, 0])
    weight = weight if unpadded else body.head(weight, features, 0)
    if kind.level != np.float32:
        weight = body.cast(weight, F32)
    if kind.grouped:
        weight = body.op("Mul", weight, _spread_scale(body, features, packed.arrays["scale"].ndim))
    product = body.op("MatMul", "X", weight)
    if "scale" in packed.arrays and not kind.grouped:
        body.op("Mul", product, body.cast(body.part("scale"), F32))
    body.nodes[-1].output[0] = body.part("Y")


def _gate(body: Body, gate: str, up: str) -> list[str]:
    """SiLU(gate) * up, as the only output."""
    body.op("Mul", body.op("Mul", gate, body.op("Sigmoid", gate)), up)
    body.nodes[-1].output[0] = "Y"
    return ["Y"]


def _spread_scale(body: Body, features: str, dimensions: int) -> str:
    """Group scales [out, groups], or of tiles [tiles, groups, 16] → one per position and output [in, out].

    Reshaping the weight to groups and back would copy it twice more.
    """
    zero, one = body.const(np.array(0, np.int64)), body.const(np.array(1, np.int64))
    positions = body.op("Range", zero, body.scalar(features), one)
    group = body.op("Div", positions, body.attribute("group_size"))
    scale = body.cast(body.part("scale"), F32)
    if dimensions == 3:
        by_group = body.op("Transpose", scale, perm=[1, 0, 2])
        scale = body.reshape(by_group, body.size(by_group, 0), body.ints(-1))
    else:
        scale = body.op("Transpose", scale, perm=[1, 0])
    return body.op("Gather", scale, group, axis=0)


DECODERS: dict[str, Callable[[Body, ValueType, bool], str]] = {
    "Dense": _decode_dense,
    "Bitmask": _decode_bits,
    "BitmaskPairs": _decode_pairs,
    "NmBits": _decode_bits,
    "NmCodes": _decode_codes,
    "Tiled": _decode_tiled,
    "TiledQuads": _decode_quads,
    "Sliding": _decode_sliding,
}
"""Form → how its levels [out, >= in] are decoded; a new layout adds its forms."""
