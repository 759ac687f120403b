"""Graph source of the dense baseline: the graph of an artifact, with the weights of the unpruned model.

Both models then run the same graph, and building one (half a minute where it must be traced) is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import helper

from losa_deploy.layouts.operator_names import DOMAIN, SWIGLU, parse_op_type
from losa_deploy.sources.checkpoint import Checkpoint

from .graph import MODEL_FILE, DenseGraph
from .rewrite import MATMULS, is_turned
from .weights import Weight


def restored_graph(exported: Path, source: Checkpoint) -> DenseGraph:
    """The dense f32 graph of `source`, made from the artifact `exported` of a model pruned from it.

    Block linears, embedding and head take the weights of `source`; everything else is the artifact's,
    which pruning does not change.
    """
    model = onnx.load(exported / MODEL_FILE, load_external_data=False)
    plain = [node for old in model.graph.node for node in _plain(old)]
    del model.graph.node[:]
    model.graph.node.extend(_without_lookup(plain, source))
    tables = [source.family.embedding] + ([] if source.tied else [source.family.head])
    used = {name for node in model.graph.node for name in node.input}
    weights = {
        f"{module}.weight": _weight(source, module)
        for module in (*source.linears, *tables)
        if f"{module}.weight" in used
    }
    others = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
    for name, weight in weights.items():
        kind = onnx.TensorProto.FLOAT
        model.graph.initializer.append(onnx.TensorProto(name=name, dims=weight.shape, data_type=kind))
    return DenseGraph(model, exported, {**_ends(model.graph.node, source), **weights})


def _weight(source: Checkpoint, module: str) -> Weight:
    """A weight as MatMul takes it, [in, out]; a table that is only gathered as it is."""
    gathered = module == source.family.embedding and not source.tied
    return Weight(source, f"{module}.weight", transposed=not gathered)


def _ends(nodes: Sequence[onnx.NodeProto], source: Checkpoint) -> dict[str, Weight]:
    """Embedding and head by what their nodes read: f32 ones have the names that a graph source gave them."""
    family, found = source.family, {}
    turned = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Transpose"}
    for node in nodes:
        if node.name == family.embedding and node.op_type == "Gather":
            value, out_first = node.input[0], True
        elif node.name == family.head and node.op_type in MATMULS:
            value, out_first = node.input[1], is_turned(node)
        else:
            continue
        if value in turned:
            value, out_first = turned[value], not out_first
        module = family.embedding if source.tied else node.name
        found[value] = Weight(source, f"{module}.weight", transposed=not out_first)
    return found


def _plain(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """A packed node as one MatMul per weight, and the gating if it gates; any other node as it is.

    Components are called `<module>.<component>`, and all weights of a node have the same components.
    """
    if node.domain != DOMAIN:
        yield node
        return
    weights = parse_op_type(node.op_type)[2]
    count = (len(node.input) - 1) // weights
    modules = [node.input[1 + index * count].rpartition(".")[0] for index in range(weights)]
    gated = node.op_type.endswith(SWIGLU)
    outputs = [f"{module}.product" for module in modules] if gated else node.output
    for module, output in zip(modules, outputs, strict=True):
        yield helper.make_node("MatMul", [node.input[0], f"{module}.weight"], [output], name=module)
    if gated:
        gate, up = outputs
        yield from _gating(gate, up, node.output[0])


def _gating(gate: str, up: str, output: str) -> Iterator[onnx.NodeProto]:
    """SiLU(gate) * up."""
    for kind, inputs, made in (
        ("Sigmoid", [gate], f"{gate}.sigmoid"),
        ("Mul", [gate, f"{gate}.sigmoid"], f"{gate}.silu"),
        ("Mul", [f"{gate}.silu", up], output),
    ):
        yield helper.make_node(kind, inputs, [made], name=made)


def _without_lookup(nodes: list[onnx.NodeProto], source: Checkpoint) -> Iterator[onnx.NodeProto]:
    """One Gather instead of the nodes that gather and decode rows of a packed embedding."""
    embedding = source.family.embedding
    lookup = [node for node in nodes if node.name.startswith(f"{embedding}.")]
    for node in nodes:
        if lookup and node is lookup[0]:
            yield from _gather(lookup[0].input[1], lookup[-1].output[0], embedding, tied=source.tied)
        elif not node.name.startswith(f"{embedding}."):
            yield node


def _gather(ids: str, rows: str, embedding: str, *, tied: bool) -> Iterator[onnx.NodeProto]:
    """Rows of the embedding; a tied one is stored as the head's MatMul takes it, and turned."""
    table = f"{embedding}.weight"
    if tied:
        turned = f"{embedding}.turned"
        yield helper.make_node("Transpose", [table], [turned], name=f"{embedding}.transpose", perm=[1, 0])
        table = turned
    yield helper.make_node("Gather", [table, ids], [rows], name=embedding)
