"""Finds each linear of a model in a dense graph, by the tensor it multiplies by, and replaces its node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from losa_deploy.errors import InputError

from .graph import DenseGraph

MATMULS = ("MatMul", "Gemm", "FusedMatMul")
"""Operators with a weight as second input; the last two may take it transposed."""


def find_linears(graph: DenseGraph, linears: Iterable[str]) -> dict[str, onnx.NodeProto]:
    """Linear → the node that applies it: one whose second input is its weight.

    Raises `InputError` naming a linear that the graph does not have.
    """
    products, found = _products(graph), {}
    for name in linears:
        nodes = products.get(f"{name}.weight")
        if not nodes:
            raise InputError(
                f"The ONNX graph of this model has no MatMul with the weight of {name}.",
                hint="Report this with the model's config.json; `--portable` does not help here.",
            )
        found[name] = nodes[0]
    return found


def find_head(graph: DenseGraph, tensor: str) -> onnx.NodeProto | None:
    """The last node that multiplies by a tensor of the checkpoint, or None."""
    found = _products(graph).get(tensor)
    return found[-1] if found else None


def find_embedding(graph: DenseGraph, tensor: str) -> onnx.NodeProto | None:
    """The Gather that reads rows of a tensor [vocabulary, hidden], directly or through a Transpose."""
    matrices = _matrices(graph)
    for node in graph.model.graph.node:
        matrix = matrices.get(node.input[0]) if node.op_type == "Gather" else None
        if matrix == _Matrix(tensor, out_first=True):
            found: onnx.NodeProto = node
            return found
    return None


def replace_node(graph: DenseGraph, node: onnx.NodeProto, by: list[onnx.NodeProto]) -> None:
    """Put other nodes in the place of one."""
    nodes = graph.model.graph.node
    index = next(i for i, other in enumerate(nodes) if other is node)
    del nodes[index]
    for position, new in enumerate(by):
        nodes.insert(index + position, new)


@dataclass(frozen=True)
class Gating:
    """The nodes that make SiLU(gate) * up of two linears' outputs, the last of which is the product."""

    nodes: tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]

    @property
    def output(self) -> str:
        name: str = self.nodes[-1].output[0]
        return name


def find_gating(graph: DenseGraph, gate: str, up: str) -> Gating | None:
    """Where the graph makes gate * sigmoid(gate) * up and uses neither value otherwise, or None."""
    users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.model.graph.node:
        for name in node.input:
            users[name].append(node)
    shown = {value.name for value in graph.model.graph.output}
    sigmoid = next((node for node in users[gate] if node.op_type == "Sigmoid"), None)
    if sigmoid is None:
        return None
    sigmoid_of_gate = sigmoid.output[0]
    silu = next((node for node in users[gate] if _multiplies(node, gate, sigmoid_of_gate)), None)
    if silu is None:
        return None
    product = next((node for node in users[up] if _multiplies(node, silu.output[0], up)), None)
    inner = {gate: 2, sigmoid_of_gate: 1, silu.output[0]: 1, up: 1}
    if product is None or any(len(users[name]) != count or name in shown for name, count in inner.items()):
        return None
    return Gating((sigmoid, silu, product))


def _multiplies(node: onnx.NodeProto, first: str, second: str) -> bool:
    return node.op_type == "Mul" and sorted(node.input) == sorted((first, second))


@dataclass(frozen=True)
class _Matrix:
    """What a value of the graph is: a tensor of the checkpoint, [out, in] or transposed."""

    tensor: str
    out_first: bool


def _products(graph: DenseGraph) -> Mapping[str, list[onnx.NodeProto]]:
    """Tensor → nodes whose output is x @ tensor.T, in graph order."""
    matrices = _matrices(graph)
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.model.graph.node:
        matrix = matrices.get(node.input[1]) if node.op_type in MATMULS else None
        if matrix is not None and matrix.out_first == is_turned(node):
            found[matrix.tensor].append(node)
    return found


def _matrices(graph: DenseGraph) -> Mapping[str, _Matrix]:
    """Values that are tensors of the checkpoint, directly or through Transposes."""
    found = {name: _Matrix(w.name, out_first=not w.transposed) for name, w in graph.weights.items()}
    for node in graph.model.graph.node:
        matrix = found.get(node.input[0]) if node.op_type == "Transpose" else None
        if matrix is not None:
            found[node.output[0]] = _Matrix(matrix.tensor, out_first=not matrix.out_first)
    return found


def is_turned(node: onnx.NodeProto) -> bool:
    """Whether a node of `MATMULS` takes its weight [out, in]."""
    return any(attribute.name == "transB" and attribute.i == 1 for attribute in node.attribute)
