"""Writes `model.onnx` and its one external data file, array by array; nothing is kept in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from losa_deploy.layouts.operator_names import DOMAIN

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
PAGE = 4096
INLINE_BYTES = 16384
IR_VERSION = 10
OPSETS = (("", 22), ("com.microsoft", 1), (DOMAIN, 1))
F32, F16, I64, I32 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
)


class GraphWriter:
    """A graph under construction. Use as a context; `finish` writes the model file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._data: BinaryIO | None = None

    def __enter__(self) -> GraphWriter:
        self._data = (self._folder / DATA_FILE).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._data is not None:
            self._data.flush()
            # Otherwise the system writes gigabytes to the disk while the models are timed.
            os.fsync(self._data.fileno())
            self._data.close()

    def tensor(self, name: str, array: NDArray[np.generic]) -> str:
        """Store an array: inline if small, else page-aligned in the data file. Returns `name`.

        A name that is stored already is left as it is.
        """
        if name in self._initializers:
            return name
        array = np.ascontiguousarray(array)
        if array.nbytes <= INLINE_BYTES:
            self._initializers[name] = numpy_helper.from_array(array, name)
            return name
        if self._data is None:
            raise RuntimeError("the writer is not open")
        offset = -(-self._data.tell() // PAGE) * PAGE
        self._data.seek(offset)
        self._data.write(array.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        proto = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA_FILE), ("offset", offset), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        self._initializers[name] = proto
        return name

    def op(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: int | float | Sequence[int],
    ) -> str:
        """Append a node; returns its first output."""
        node = helper.make_node(op_type, inputs, outputs, name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return outputs[0]

    def finish(
        self,
        inputs: Mapping[str, tuple[int, Sequence[str | int]]],
        outputs: Mapping[str, tuple[int, Sequence[str | int]]],
    ) -> None:
        """Write the model; inputs and outputs are name → (element type, shape)."""
        graph = helper.make_graph(
            self._nodes,
            "decoder",
            [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
            [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name = "losa-deploy bench"
        (self._folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))
