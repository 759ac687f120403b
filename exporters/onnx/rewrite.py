"""Finds each linear of a model in a dense graph, by content, and replaces its MatMul."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from losa_deploy.errors import InputError

from .graph import DenseGraph

Array = NDArray[np.generic]


MATMULS = ("MatMul", "Gemm", "FusedMatMul")
"""Operators with a weight as second input; the last two may take it transposed."""


@dataclass(frozen=True)
class Site:
    """Where a linear is applied: a node whose second input is its weight."""

    node: onnx.NodeProto
    initializer: str
    """The weight: [in, out] or [out, in], possibly behind a Transpose."""


def unpack_siblings(graph: DenseGraph) -> None:
    """Undo the packing of several linears into one MatMul and a Split, so that each has its own."""
    model = graph.model.graph
    constants = {tensor.name: tensor for tensor in model.initializer}
    splits = {node.input[0]: node for node in model.node if node.op_type == "Split" and len(node.input) > 1}
    result: list[onnx.NodeProto] = []
    undone: set[str] = set()
    for node in model.node:
        if node.op_type == "Split" and node.input[0] in undone:
            continue
        split = splits.get(node.output[0]) if node.op_type == "MatMul" else None
        if split is None or node.input[1] not in constants or split.input[1] not in constants:
            result.append(node)
            continue
        undone.add(node.output[0])
        sizes = graph.array(constants[split.input[1]]).astype(np.int64)
        parts = np.split(graph.array(constants[node.input[1]]), np.cumsum(sizes)[:-1], axis=1)
        for output, part in zip(split.output, parts, strict=True):
            name = f"{output}.weight"
            model.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(part), name))
            result.append(helper.make_node("MatMul", [node.input[0], name], [output]))
    del model.node[:]
    model.node.extend(result)


def find_linears(
    graph: DenseGraph, shapes: Mapping[str, tuple[int, int]], weight: Callable[[str], NDArray[np.float32]]
) -> dict[str, Site]:
    """Linear → its site, matching weights or their transposes by shape and content.

    Linears with equal weights are told apart by their order, which is the graph's. Raises `InputError`
    naming a linear that the graph does not have.
    """
    sites = _sites(graph, {tuple(sorted(shape)) for shape in shapes.values()})
    found: dict[str, Site] = {}
    for name in shapes:
        candidates = sites.get(_fingerprint(weight(name)))
        if not candidates:
            raise InputError(
                f"The ONNX graph of this model has no MatMul with the weight of {name}.",
                hint="Report this with the model's config.json; `--portable` does not help here.",
            )
        found[name] = candidates.pop(0)
    return found


def find_head(graph: DenseGraph, weight: NDArray[np.float32]) -> Site | None:
    """The last MatMul with this weight, or None."""
    shape = (weight.shape[0], weight.shape[1])
    found = _sites(graph, {tuple(sorted(shape))}).get(_fingerprint(weight))
    return found[-1] if found else None


def find_embedding(graph: DenseGraph, table: NDArray[np.float32]) -> onnx.NodeProto | None:
    """The Gather that reads rows of `table` [vocabulary, hidden], directly or through a Transpose."""
    sources = _weights_behind(graph)
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    for node in graph.model.graph.node:
        name = sources.get(node.input[0]) if node.op_type == "Gather" else None
        if name is None or sorted(constants[name].dims) != sorted(table.shape):
            continue
        if _same(graph.array(constants[name]), table):
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


def _sites(graph: DenseGraph, shapes: set[tuple[int, ...]]) -> dict[str, list[Site]]:
    """Fingerprint of a weight in [out, in] orientation → nodes multiplying by it, in graph order."""
    sources = _weights_behind(graph)
    transposed = {n.output[0] for n in graph.model.graph.node if n.op_type == "Transpose"}
    constants = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    prints: dict[tuple[str, bool], str] = {}
    sites: dict[str, list[Site]] = defaultdict(list)
    for node in graph.model.graph.node:
        name = sources.get(node.input[1]) if node.op_type in MATMULS else None
        if name is None or tuple(sorted(constants[name].dims)) not in shapes:
            continue
        out_first = (node.input[1] in transposed) != _attribute(node, "transB")
        if (name, out_first) not in prints:
            array = graph.array(constants[name])
            prints[name, out_first] = _fingerprint(array if out_first else array.T)
        sites[prints[name, out_first]].append(Site(node, name))
    return sites


def _weights_behind(graph: DenseGraph) -> dict[str, str]:
    """Value name → initializer it is, directly or through one 2-D Transpose."""
    names = {tensor.name: tensor.name for tensor in graph.model.graph.initializer if len(tensor.dims) == 2}
    for node in graph.model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in names:
            names[node.output[0]] = node.input[0]
    return names


def _attribute(node: onnx.NodeProto, name: str) -> bool:
    return any(a.name == name and a.i == 1 for a in node.attribute)


def _fingerprint(weight: Array) -> str:
    """Hash of a [out, in] matrix and its shape."""
    digest = hashlib.sha1(str(weight.shape).encode(), usedforsecurity=False)
    for start in range(0, weight.shape[0], 4096):
        digest.update(np.ascontiguousarray(weight[start : start + 4096]).data)
    return digest.hexdigest()


def _same(stored: Array, table: NDArray[np.float32]) -> bool:
    """Equality of a stored matrix, or its transpose, with a table, in pieces."""
    for candidate in (stored, stored.T):
        if candidate.shape == table.shape and all(
            np.array_equal(candidate[i : i + 4096], table[i : i + 4096])
            for i in range(0, table.shape[0], 4096)
        ):
            return True
    return False
