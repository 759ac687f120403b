"""Puts packed tensors into a dense graph: block linears, then embedding and head."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Progress
from losa_deploy.layouts import LAYOUTS, PackedTensor
from losa_deploy.manifest import TensorRecord

from .functions import DOMAIN, attributes, exact, function, op_type
from .graph import DenseGraph
from .lookup import lookup
from .plan import Job, choice
from .rewrite import Site, find_embedding, find_head, find_linears, replace, unpack_siblings
from .writer import Writer


@dataclass
class Packing:
    """A graph being rewritten, and what was stored so far."""

    graph: DenseGraph
    writer: Writer
    linears: list[TensorRecord] = field(default_factory=list)
    others: list[TensorRecord] = field(default_factory=list)
    used: dict[str, tuple[PackedTensor, bool]] = field(default_factory=dict)
    """Operator → one tensor stored for it and whether all are unpadded."""

    def functions(self) -> list[onnx.FunctionProto]:
        """Definitions of the operators in use, by name."""
        return [function(packed, unpadded=unpadded) for _, (packed, unpadded) in sorted(self.used.items())]


def pack_graph(job: Job, graph: DenseGraph, writer: Writer, progress: Progress) -> Packing:
    """Rewrite the graph in place; packed arrays go to the writer as they are made."""
    packing = Packing(graph, writer)
    unpack_siblings(graph)
    checkpoint = job.checkpoint
    linears = checkpoint.linears
    sites = find_linears(graph, linears, lambda name: checkpoint.array(f"{name}.weight"))
    for index, name in enumerate(linears):
        progress(index, len(linears) + 1, f"packing {name}")
        mask = job.mask(name)
        picked = choice(job, name, mask)
        weight = checkpoint.array(f"{name}.weight")
        try:
            packed = LAYOUTS[picked.layout].pack(weight, mask, picked.options)
        except ValueError as error:
            raise InputError(
                f"{name} cannot be stored as {picked.options.value_type}: {error}.",
                hint="Choose another --value-type, e.g. f32.",
                details={"tensor": name},
            ) from None
        _place_linear(packing, name, sites[name], packed)
        packing.linears.append(_record(name, packed, picked.reason))
    progress(len(linears), len(linears) + 1, "packing embedding and head")
    _pack_ends(job, packing)
    _keep_rest(packing)
    progress(len(linears) + 1, len(linears) + 1, "packed")
    return packing


def _place_linear(packing: Packing, name: str, site: Site, packed: PackedTensor) -> None:
    """Replace a MatMul or Gemm by the packed node; the bias of a Gemm becomes an Add."""
    output = site.node.output[0]
    bias = site.node.input[2] if site.node.op_type == "Gemm" and len(site.node.input) > 2 else ""
    target = f"{name}.product" if bias else output
    nodes = [_matmul(packing, name, packed, site.node.input[0], target)]
    if bias:
        nodes.append(helper.make_node("Add", [target, bias], [output], name=f"{name}.bias_add"))
    replace(packing.graph, site.node, nodes)


def _matmul(packing: Packing, name: str, packed: PackedTensor, x: str, output: str) -> onnx.NodeProto:
    """The node for a packed tensor, named after its module; dense f32 is a plain MatMul."""
    if packed.layout == "dense" and packed.value_type == "f32":
        weight = packing.writer.add(f"{name}.weight", packed.arrays["values"].T)
        return helper.make_node("MatMul", [x, weight], [output], name=name)
    inputs = [packing.writer.add(f"{name}.{part}", array) for part, array in packed.arrays.items()]
    return _packed_node(packing, name, packed, [x, *inputs], output)


def _packed_node(
    packing: Packing, name: str, packed: PackedTensor, inputs: list[str], output: str
) -> onnx.NodeProto:
    kind = op_type(packed)
    before = packing.used.get(kind)
    packing.used[kind] = (packed, exact(packed) and (before is None or before[1]))
    node = helper.make_node(kind, inputs, [output], name=name, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes(packed).items())
    return node


def _pack_ends(job: Job, packing: Packing) -> None:
    """Store embedding and head in the head's value type; a tied pair shares one set of initializers."""
    checkpoint, options = job.checkpoint, job.head_options
    for name, (tensor, shape) in job.other.items():
        table = checkpoint.array(tensor)
        gather = find_embedding(packing.graph, table) if name == checkpoint.family.embedding else None
        is_head = checkpoint.tied or name == checkpoint.family.head
        head = find_head(packing.graph, table) if is_head else None
        if (gather is None and name == checkpoint.family.embedding) or (head is None and is_head):
            raise InputError(
                f"The ONNX graph of this model does not use {tensor} as expected.",
                hint="Report this with the model's config.json.",
            )
        try:
            packed = LAYOUTS["dense"].pack(table, np.ones(shape, np.bool_), options)
        except ValueError as error:
            raise InputError(f"{name} cannot be stored as {options.value_type}: {error}.") from None
        reason = "shared by embedding and head" if checkpoint.tied else "embedding and head stay dense"
        packing.others.append(_record(name, packed, reason))
        if options.value_type == "f32":
            _name_nodes(checkpoint, gather, head)
            continue
        stored = [packing.writer.add(f"{name}.{part}", array) for part, array in packed.arrays.items()]
        if gather is not None:
            replace(packing.graph, gather, lookup(packing.writer, name, packed, stored, gather))
        if head is not None:
            node, head_name = head.node, checkpoint.family.head
            by = _packed_node(packing, head_name, packed, [node.input[0], *stored], node.output[0])
            replace(packing.graph, node, [by])


def _name_nodes(checkpoint: Checkpoint, gather: onnx.NodeProto | None, head: Site | None) -> None:
    """f32 ends stay as the graph source wrote them; the nodes get the modules' names."""
    if gather is not None:
        gather.name = checkpoint.family.embedding
    if head is not None:
        head.node.name = checkpoint.family.head


def _keep_rest(packing: Packing) -> None:
    """Drop what nothing uses any more, and store every other initializer as it was."""
    graph = packing.graph.model.graph
    _drop_unused(graph)
    used = {name for node in graph.node for name in node.input}
    stored = {tensor.name for tensor in packing.writer.initializers}
    for tensor in graph.initializer:
        if tensor.name in used and tensor.name not in stored:
            packing.writer.add(tensor.name, packing.graph.array(tensor))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes whose outputs are not used, e.g. the Transpose of a replaced weight."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _record(name: str, packed: PackedTensor, reason: str) -> TensorRecord:
    return TensorRecord(
        name=name,
        shape=packed.shape,
        layout=packed.layout,
        value_type=packed.value_type,
        nnz=packed.nnz,
        bytes=packed.nbytes,
        bits_per_weight=round(packed.bits_per_weight, 6),
        sha256=packed.sha256,
        reason=reason,
    )
