"""Reads an exported `model.onnx` back: linear → packed tensor → weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.layouts import VALUE_TYPES, PackedTensor, unpack
from losa_deploy.layouts.base import COMPONENTS, FORMAT_VERSION, Component, PackOptions
from losa_deploy.layouts.operator_names import DOMAIN, layout_of_form, parse_op_type
from losa_deploy.lazy import Lazy
from losa_deploy.manifest import TensorRecord

from .graph import MODEL_FILE, DenseGraph

NODE_ATTRIBUTES = ("format", "in_features")


def load_graph(folder: Path) -> DenseGraph:
    """The graph of an exported folder; its data stays on disk."""
    path = folder / MODEL_FILE
    try:
        return DenseGraph(onnx.load(path, load_external_data=False), folder)
    except FileNotFoundError:
        raise InputError(f"{folder} has no {MODEL_FILE}.", hint="Is it an ONNX export?") from None
    except Exception as error:  # protobuf's error type depends on its implementation
        raise InputError(f"{path} cannot be read as ONNX: {error}.", hint="Export the model again.") from None


def decode(folder: Path) -> Lazy:
    """Linear → weight [out, in] as the stored bytes define it; includes a packed head."""
    graph = load_graph(folder)
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    weights: dict[str, Callable[[], NDArray[np.float32]]] = {}

    def dense(name: str) -> NDArray[np.float32]:
        return np.array(graph.array(constants[name]).T, np.float32, order="C")

    for node in graph.model.graph.node:
        if node.domain == DOMAIN:
            for name, packed in packed_tensors(node, lambda name: graph.array(constants[name])):
                weights[name] = partial(_unpacked, packed)
        elif node.op_type == "MatMul" and node.input[1] == f"{node.name}.weight":
            weights[node.name] = partial(dense, node.input[1])
    return Lazy(weights)


def _unpacked(packed: PackedTensor) -> NDArray[np.float32]:
    return unpack(packed).weight


def decode_tables(folder: Path, records: Sequence[TensorRecord], group_size: int) -> Lazy:
    """Embedding and head → weight [out, in], those of `records` that are stored packed (not f32)."""
    graph = load_graph(folder)
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    weights: dict[str, Callable[[], NDArray[np.float32]]] = {}
    for record in records:
        names = {part: f"{record.name}.{part}" for part in COMPONENTS}
        arrays = {part: graph.array(constants[n]) for part, n in names.items() if n in constants}
        if "values" not in arrays:
            continue
        options = PackOptions(value_type=record.value_type, group_size=group_size)
        shape = (record.shape[0], record.shape[1])
        params = VALUE_TYPES[options.value_type].params(options)
        packed = PackedTensor("dense", options.value_type, shape, params, arrays, record.nnz)
        weights[record.name] = partial(_unpacked, packed)
    return Lazy(weights)


def packed_tensors(
    node: onnx.NodeProto, array: Callable[[str], Component]
) -> Iterator[tuple[str, PackedTensor]]:
    """Linear and packed tensor of every weight that an `ai.losa` node consumes."""
    form, value_type, weights = parse_op_type(node.op_type)
    layout = layout_of_form(form)
    attributes: Mapping[str, int] = {a.name: a.i for a in node.attribute}
    if attributes.get("format") != FORMAT_VERSION:
        raise InputError(
            f"{node.name} is stored in packed format {attributes.get('format', 0)}, "
            f"expected format {FORMAT_VERSION}.",
            hint="Export the model again with this version.",
        )
    params = {name: value for name, value in attributes.items() if name not in NODE_ATTRIBUTES}
    names = node.input[1:]
    width = len(names) // weights
    for start in range(0, len(names), width):
        own = names[start : start + width]
        # A tied head reads the embedding's tables; its node has the name of the head.
        linear = node.name if weights == 1 else own[0].rpartition(".")[0]
        components = {name.rpartition(".")[2]: array(name) for name in own}
        # Rows that share a mask have scales of their own.
        by_row = (
            "scale" if "rows_per_mask" in params else "positions" if "positions" in components else "values"
        )
        rows = components[by_row].shape[0] * layout.rows_together
        shape = (int(rows), attributes["in_features"])
        yield linear, PackedTensor(layout.name, value_type, shape, params, components, shape[0] * shape[1])
