"""What the functions of an ONNX model are built from: standard operators, one value after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper


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

    def zeros(self, dtype: np.dtype[np.generic], *parts: str) -> str:
        """Zeros of the shape given by int64 vectors."""
        shape = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)
        name = f"v{len(self.nodes)}"
        zero = numpy_helper.from_array(np.zeros(1, dtype))
        self.nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=zero))
        return name
