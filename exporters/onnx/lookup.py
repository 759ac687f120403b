"""The embedding of a packed table in standard operators: gather what is stored, decode only that."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from losa_deploy.layouts import PackedTensor
from losa_deploy.layouts.rows import BLOCK

from .writer import Writer

F32 = onnx.TensorProto.FLOAT


def lookup(
    writer: Writer, name: str, packed: PackedTensor, stored: list[str], gather: onnx.NodeProto
) -> list[onnx.NodeProto]:
    """Nodes that replace `gather` (ids [batch, tokens] → rows [batch, tokens, hidden], f32).

    `stored` are the names of the components of `packed`, a dense f16, i8 or i4 table.
    """
    steps = _Steps(writer, name)
    ids = gather.input[1]
    rows = steps.add("Gather", stored[0], ids, axis=0)
    match packed.value_type:
        case "i8":
            scale = steps.add("Cast", steps.add("Gather", stored[1], ids, axis=0), to=F32)
            scale = steps.add("Unsqueeze", scale, steps.ints("last", -1))
            steps.add("Mul", steps.add("Cast", rows, to=F32), scale)
        case "i4":
            _decode_i4(steps, packed, rows, steps.add("Gather", stored[1], ids, axis=0))
        case _:
            steps.add("Cast", rows, to=F32)
    steps.nodes[-1].output[0] = gather.output[0]
    return steps.nodes


class _Steps:
    """Nodes of a lookup under construction, named after the embedding."""

    def __init__(self, writer: Writer, name: str) -> None:
        self.writer, self.name = writer, name
        self.nodes: list[onnx.NodeProto] = []

    def add(self, kind: str, *inputs: str, **attributes: int) -> str:
        """Append a node and return the name of its output."""
        step = f"{self.name}.{kind.lower()}{len(self.nodes)}"
        node = helper.make_node(kind, inputs, [f"{step}.out"], name=step)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return f"{step}.out"

    def ints(self, part: str, *values: int) -> str:
        """A constant int64 vector."""
        return self.writer.add(f"{self.name}.{part}", np.array(values, np.int64))


def _decode_i4(steps: _Steps, packed: PackedTensor, rows: str, scale: str) -> None:
    """Gathered bytes [batch, tokens, ceil(hidden/2)] and f16 scales [batch, tokens, groups] → rows."""
    hidden, size = packed.shape[1], packed.params["group_size"]
    groups = packed.arrays["scale"].shape[1]
    byte = np.arange(256)
    table = packed.arrays["table"]
    pairs = steps.writer.add(f"{steps.name}.pairs", np.stack([table[byte & 15], table[byte >> 4]], axis=1))
    levels = steps.add("Gather", pairs, steps.add("Cast", rows, to=onnx.TensorProto.INT32), axis=0)
    levels = steps.add("Cast", _in_order(steps, levels, hidden), to=F32)
    missing = groups * size - hidden
    levels = steps.add("Pad", levels, steps.ints("pads", 0, 0, 0, 0, 0, missing))
    grouped = steps.add("Reshape", levels, steps.ints("groups", 0, 0, groups, size))
    factor = steps.add("Unsqueeze", steps.add("Cast", scale, to=F32), steps.ints("last", -1))
    scaled = steps.add("Reshape", steps.add("Mul", grouped, factor), steps.ints("flat", 0, 0, groups * size))
    end, axis = steps.ints("end", hidden), steps.ints("axis", 2)
    steps.add("Slice", scaled, steps.ints("start", 0), end, axis)


def _in_order(steps: _Steps, levels: str, hidden: int) -> str:
    """Levels [batch, tokens, bytes, 2] of rows split in halves → [batch, tokens, hidden], one Gather."""
    order = np.empty(hidden, np.int64)
    for block in range(0, hidden, BLOCK):
        count = min(BLOCK, hidden - block)
        half = -(-count // 2)
        place = np.arange(count)
        order[block : block + count] = block + 2 * (place % half) + place // half
    flat = steps.add("Reshape", levels, steps.ints("row", 0, 0, -1))
    return steps.add("Gather", flat, steps.writer.add(f"{steps.name}.order", order), axis=2)
