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
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from losa_deploy.layouts import tiled
from losa_deploy.layouts.base import PackedTensor, ValueType
from losa_deploy.layouts.operator_names import DOMAIN, attributes, form, op_type
from losa_deploy.layouts.values import BLOCK as ROW_BLOCK

VERSION = 1
OPSET = 20
"""Version of the standard operators that the bodies use."""
BLOCK = 8
"""Levels per block in the bitmask decoding."""
F32, I32, U8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.UINT8
LEVEL_DTYPE: dict[ValueType, type[np.generic]] = {
    "f32": np.float32,
    "f16": np.float16,
    "i8": np.int8,
    "i4": np.int8,
}
"""What a stored value is before its scale is applied; i4 codes become int8 levels."""


@dataclass
class Body:
    """A function body under construction; every method returns the name of a new value."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    suffix: str = ""
    """Of the components that are decoded now; an operator with several weights numbers them."""

    def part(self, name: str) -> str:
        """A component of the weight that is decoded now."""
        return name + self.suffix

    def op(self, op_type: str, *inputs: str, **attributes: int | Sequence[int] | str) -> str:
        """Append a standard operator with one output."""
        name = f"v{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [name])
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return name

    def const(self, value: NDArray[np.generic]) -> str:
        """A constant tensor."""
        name = f"v{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(value, order="C"))
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.const(np.array(values, np.int64))

    def attribute(self, name: str) -> str:
        """An integer attribute of the node, as an int64 vector of one element."""
        node = helper.make_node("Constant", [], [f"v{len(self.nodes)}"])
        node.attribute.append(
            onnx.AttributeProto(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
        )
        self.nodes.append(node)
        return self.op("Reshape", node.output[0], self.ints(1))

    def cast(self, value: str, to: int) -> str:
        return self.op("Cast", value, to=to)

    def size(self, value: str, axis: int) -> str:
        """One dimension of a value, as an int64 vector of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: str, *parts: str) -> str:
        """Reshape to the concatenation of int64 vectors."""
        shape = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
        return self.op("Reshape", value, shape)

    def head(self, value: str, count: str, axis: int) -> str:
        """The first `count` entries along an axis."""
        return self.op("Slice", value, self.ints(0), count, self.ints(axis))

    def scalar(self, vector: str) -> str:
        """A vector of one element as a scalar."""
        return self.op("Squeeze", vector)

    def zeros(self, dtype: type[np.generic], *parts: str) -> str:
        """Zeros of the shape given by int64 vectors."""
        shape = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
        name = f"v{len(self.nodes)}"
        zero = numpy_helper.from_array(np.zeros(1, dtype))
        self.nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=zero))
        return name


def exact(packed: PackedTensor) -> bool:
    """True if rows decode without padding, so that there is nothing to cut off."""
    in_features, params = packed.shape[1], packed.params
    if packed.layout == "dense":
        return packed.value_type != "i4" or in_features % ROW_BLOCK == 0
    if packed.layout == "tiled":
        return True
    if params.get("position_bits"):
        return in_features % params["m"] == 0
    return bool(packed.arrays["positions"].shape[1] * 8 == in_features)


def function(packed: PackedTensor, weights: int = 1, *, unpadded: bool = False) -> onnx.FunctionProto:
    """The function that defines the operator of `packed`: Y[..., out] = X[..., in] @ W.T.

    With several weights the components are numbered (`values0`, `values1`), and so are the outputs.
    `unpadded` promises that every tensor of the model that uses it is `exact`.
    """
    body, name = Body(), op_type(packed, weights)
    inputs, outputs = ["X"], []
    for index in range(weights):
        body.suffix = str(index) if weights > 1 else ""
        matrix = _DECODERS[form(packed)](body, packed.value_type, unpadded)
        _finish(body, matrix, packed, unpadded=unpadded)
        inputs += [body.part(part) for part in packed.arrays]
        outputs.append(body.part("Y"))
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(
        DOMAIN, name, inputs, outputs, body.nodes, imports, attributes=list(attributes(packed))
    )


def _levels(body: Body, value_type: ValueType) -> str:
    """Stored values → levels of the same shape, or for i4 [..., 2] levels per byte."""
    if value_type != "i4":
        return body.part("values")
    byte = np.arange(256, dtype=np.int32)
    pairs = body.op(
        "Gather", body.part("table"), body.const(np.stack([byte & 15, byte >> 4], axis=1)), axis=0
    )
    return body.op("Gather", pairs, body.cast(body.part("values"), I32), axis=0)


def _decode_dense(body: Body, value_type: ValueType, unpadded: bool) -> str:
    """Levels [out, in], for i4 [out, in + 1] if `in` is odd."""
    levels = _levels(body, value_type)
    if value_type != "i4":
        return levels
    rows, half = body.size(body.part("values"), 0), body.ints(ROW_BLOCK // 2)
    blocks = body.op("Div", body.attribute("in_features"), body.ints(ROW_BLOCK))
    full = body.op("Mul", blocks, half)
    if not unpadded:
        rest = body.op("Slice", levels, full, body.size(levels, 1), body.ints(1))
        levels = body.head(levels, full, 1)
    split = body.op("Transpose", body.reshape(levels, rows, blocks, half, body.ints(2)), perm=[0, 1, 3, 2])
    whole = body.reshape(split, rows, body.op("Mul", full, body.ints(2)))
    if unpadded:
        return whole
    tail = body.op("Transpose", rest, perm=[0, 2, 1])
    width = body.op("Mul", body.size(tail, 2), body.ints(2))
    # Another tensor of the model may have no tail: then the width is zero, and means it.
    flat = body.op("Reshape", tail, body.op("Concat", rows, width, axis=0), allowzero=1)
    return body.op("Concat", whole, flat, axis=1)


def _decode_bits(body: Body, value_type: ValueType, unpadded: bool) -> str:
    """Mask bits and levels → levels [out, padded in].

    A mask byte's kept values are a run that starts at `first`; it lies within two neighbouring
    blocks of 8 levels. A table indexed by `first % 8` and the byte says which of the 16 levels
    each of the byte's 8 positions takes, or the zero behind them if it is pruned.
    """
    levels = _levels(body, value_type)
    byte = body.cast(body.part("positions"), I32)
    bits = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int32)
    kept = body.op("Gather", body.const(bits.sum(axis=1).astype(np.int32)), byte, axis=0)
    if value_type == "i4":
        levels = body.op("Transpose", levels, perm=[1, 0])  # first all low nibbles, then all high ones
        first = _first_in_pairs(body, kept, body.size(levels, 1))
    else:
        flat = body.reshape(kept, body.ints(-1))
        first = body.op("CumSum", flat, body.const(np.array(0, np.int64)), exclusive=1)
    first, byte = body.reshape(first, body.ints(-1)), body.reshape(byte, body.ints(-1))
    blocks = body.reshape(levels, body.ints(-1, BLOCK))
    here = body.op("Slice", blocks, body.ints(0), body.ints(-1), body.ints(0))
    after = body.op("Slice", blocks, body.ints(1), body.size(blocks, 0), body.ints(0))
    nothing = body.zeros(LEVEL_DTYPE[value_type], body.size(here, 0), body.ints(1))
    pairs = body.op("Concat", here, after, nothing, axis=1)
    eight = body.const(np.array(BLOCK, np.int32))
    phase = body.op("Mul", body.op("Mod", first, eight), body.const(np.array(256, np.int32)))
    column = body.op("Gather", body.const(_columns(bits)), body.op("Add", phase, byte), axis=0)
    run = body.op("Gather", pairs, body.op("Div", first, eight), axis=0)
    found = body.op("GatherElements", run, column, axis=1)
    return body.reshape(found, body.size(body.part("positions"), 0), body.ints(-1))


def _first_in_pairs(body: Body, kept: str, length: str) -> str:
    """Bits per mask byte [out, bytes] → index of each byte's first level among low and then high nibbles.

    `length` is the number of bytes of the stream: where the high nibbles, of the odd rows, start.
    """
    rows, one = body.size(body.part("positions"), 0), body.ints(1)
    inside = body.op("CumSum", kept, body.const(np.array(1, np.int64)), exclusive=1)
    totals = body.op("ReduceSum", kept, one, keepdims=1)
    odd = body.op("Mod", rows, body.ints(2))
    paired = body.reshape(
        body.op("Pad", totals, body.op("Concat", body.ints(0, 0), odd, body.ints(0), axis=0)),
        body.ints(-1, 2),
    )
    lengths = body.op("ReduceMax", paired, one, keepdims=1)
    start = body.op("CumSum", lengths, body.const(np.array(0, np.int64)), exclusive=1)
    shift = body.cast(body.op("Concat", body.ints(0), length, axis=0), I32)
    offset = body.head(body.reshape(body.op("Add", start, shift), body.ints(-1, 1)), rows, 0)
    return body.op("Add", inside, offset)


def _columns(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """[8 * 256, 8]: for each phase and mask byte, the column of each position in a pair of blocks."""
    rank = np.cumsum(bits, axis=1) - bits
    phases = np.arange(BLOCK)[:, None, None] + rank[None]
    columns = np.where(bits[None] > 0, phases, 2 * BLOCK)
    return columns.reshape(-1, 8).astype(np.int32)


def _decode_codes(body: Body, value_type: ValueType, unpadded: bool) -> str:
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
    levels = _slot_levels(body, value_type, rows, slots)
    empty = body.zeros(LEVEL_DTYPE[value_type], rows, body.op("Mul", groups, m))
    return body.op("ScatterElements", empty, index, levels, axis=1)


def _decode_tiled(body: Body, value_type: ValueType, unpadded: bool) -> str:
    """Slots of tiles of N:16 → levels [out, in]."""
    del unpadded  # rows of tiles have no padding
    values = body.part("values")
    low, four = (body.const(np.array(number, np.uint8)) for number in (15, 4))
    both = values if value_type == "i4" else body.part("positions")
    positions = body.op("BitwiseAnd", both, low)
    high = body.op("BitShift", both, four, direction="RIGHT")
    if value_type == "i4":
        levels = body.op("Gather", body.part("table"), body.cast(high, I32), axis=0)
    else:
        positions, levels = body.op("Concat", positions, high, axis=3), values
    return _scatter_slots(body, positions, levels, LEVEL_DTYPE[value_type])


def _decode_quads(body: Body, value_type: ValueType, unpadded: bool) -> str:
    """Slots of tiles of 1:4 or 2:4 → levels [out, in]."""
    del unpadded  # rows of tiles have no padding
    groups = body.op("Div", body.attribute("in_features"), body.ints(tiled.TILE))
    deep = body.op("Mul", body.attribute("n"), body.ints(2))
    count, tiles = body.op("Mul", groups, deep), body.size(body.part("values"), 0)
    shape = body.op("Concat", tiles, groups, deep, body.ints(tiled.STEP), axis=0)
    positions = body.head(_split_lines(body, "positions", tiled.PER_LINE, 2), count, 1)
    if value_type == "i4":
        codes = body.cast(_split_lines(body, "values", 2, 4), I32)
        levels = body.op("Gather", body.part("table"), codes, axis=0)
    else:
        levels = body.part("values")
    return _scatter_slots(
        body, body.reshape(positions, shape), body.reshape(levels, shape), LEVEL_DTYPE[value_type]
    )


def _split_lines(body: Body, name: str, count: int, bits: int) -> str:
    """[tiles, lines, 32] → the steps that share a line, [tiles, lines * count, 32]."""
    shifts = body.const(np.arange(0, bits * count, bits, dtype=np.uint8)[:, None])
    lines = body.op("Unsqueeze", body.part(name), body.ints(2))
    shifted = body.op("BitShift", lines, shifts, direction="RIGHT")
    split = body.op("BitwiseAnd", shifted, body.const(np.array(2**bits - 1, np.uint8)))
    return body.reshape(split, body.size(split, 0), body.ints(-1, tiled.STEP))


def _scatter_slots(body: Body, positions: str, levels: str, dtype: type[np.generic]) -> str:
    """Positions and levels of slots [tiles, in / 16, steps, 32] → levels [out, in]."""
    features, n, m = body.attribute("in_features"), body.attribute("n"), body.attribute("m")
    rows = body.op("Mul", body.size(positions, 0), body.ints(tiled.TILE))
    used = body.op("Div", body.op("Mul", n, body.ints(tiled.TILE)), m)
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


def _slot_levels(body: Body, value_type: ValueType, rows: str, slots: str) -> str:
    """Stream of a fixed count per row → levels [out, slots]."""
    levels = _levels(body, value_type)
    if value_type != "i4":
        return body.reshape(body.head(levels, body.op("Mul", rows, slots), 0), rows, slots)
    two = body.ints(2)
    pairs = body.op("Div", body.op("Add", rows, body.ints(1)), two)
    kept = body.reshape(body.head(levels, body.op("Mul", pairs, slots), 0), pairs, slots, two)
    by_row = body.op("Transpose", kept, perm=[0, 2, 1])
    return body.head(body.reshape(by_row, body.op("Mul", pairs, two), slots), rows, 0)


def _finish(body: Body, matrix: str, packed: PackedTensor, *, unpadded: bool) -> None:
    """Levels [out, >= in] → Y. Row scales are applied to the product, which costs no memory."""
    features, value_type = body.attribute("in_features"), packed.value_type
    weight = body.op("Transpose", matrix, perm=[1, 0])
    weight = weight if unpadded else body.head(weight, features, 0)
    if value_type in ("f16", "i8"):
        weight = body.cast(weight, F32)
    elif value_type == "i4":
        weight = body.op("Mul", body.cast(weight, F32), _spread_scale(body, features, packed.layout))
    product = body.op("MatMul", "X", weight)
    if value_type == "i8":
        body.op("Mul", product, body.cast(body.part("scale"), F32))
    body.nodes[-1].output[0] = body.part("Y")


def _spread_scale(body: Body, features: str, layout: str) -> str:
    """Group scales [out, groups], or of tiles [tiles, groups, 16] → one per position and output [in, out].

    Reshaping the weight to groups and back would copy it twice more.
    """
    zero, one = body.const(np.array(0, np.int64)), body.const(np.array(1, np.int64))
    positions = body.op("Range", zero, body.scalar(features), one)
    group = body.op("Div", positions, body.attribute("group_size"))
    scale = body.cast(body.part("scale"), F32)
    if layout == "tiled":
        by_group = body.op("Transpose", scale, perm=[1, 0, 2])
        scale = body.reshape(by_group, body.size(by_group, 0), body.ints(-1))
    else:
        scale = body.op("Transpose", scale, perm=[1, 0])
    return body.op("Gather", scale, group, axis=0)


_DECODERS: dict[str, Callable[[Body, ValueType, bool], str]] = {
    "Dense": _decode_dense,
    "Bitmask": _decode_bits,
    "NmBits": _decode_bits,
    "NmCodes": _decode_codes,
    "Tiled": _decode_tiled,
    "TiledQuads": _decode_quads,
}
