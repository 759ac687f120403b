"""Puts packed tensors into a dense graph: block linears, then embedding and head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from losa_deploy.errors import InputError
from losa_deploy.interfaces import PlannedTensor
from losa_deploy.layouts import LAYOUTS, PackedTensor
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type
from losa_deploy.manifest import TensorRecord
from losa_deploy.planned import storing
from losa_deploy.progress import Progress
from losa_deploy.sources.checkpoint import Checkpoint

from .functions import function
from .graph import DenseGraph
from .lookup import lookup
from .plan import Job, packing_options, siblings
from .rewrite import (
    Gating,
    find_embedding,
    find_gating,
    find_head,
    find_linears,
    replace_node,
)
from .sizes import GATED_WEIGHTS
from .writer import Writer

MOST_WEIGHTS = 3
"""Of one node: q, k and v."""


@dataclass(frozen=True)
class Operator:
    """An operator that the graph uses."""

    packed: PackedTensor
    """One of the tensors stored for it."""
    weights: int
    gated: bool
    unpadded: bool
    """True if all its tensors are."""


@dataclass
class Packing:
    """A graph being rewritten, and what was stored so far."""

    graph: DenseGraph
    writer: Writer
    linears: list[TensorRecord] = field(default_factory=list)
    others: list[TensorRecord] = field(default_factory=list)
    used: dict[str, Operator] = field(default_factory=dict)
    """Operators by name."""

    def functions(self) -> list[onnx.FunctionProto]:
        """Definitions of the operators in use, by name."""
        return [
            function(use.packed, use.weights, gated=use.gated, unpadded=use.unpadded)
            for _, use in sorted(self.used.items())
        ]


def pack_graph(
    job: Job, tensors: Iterable[PlannedTensor], graph: DenseGraph, writer: Writer, progress: Progress
) -> Packing:
    """Rewrite the graph in place, each of `tensors` as planned; packed arrays go to the writer when made."""
    packing, checkpoint = Packing(graph, writer), job.checkpoint
    linears, planned = checkpoint.linears, {tensor.name: tensor for tensor in tensors}
    nodes = find_linears(graph, linears)
    done = 0
    for group in siblings(checkpoint):
        stored: list[Stored] = []
        for name in group:
            progress(done, len(linears) + 1, f"packing {name}")
            packed = _packed(job, planned[name])
            stored.append(Stored(name, nodes[name], packed))
            packing.linears.append(TensorRecord.of(name, packed, planned[name].reason))
            done += 1
        _place(packing, stored)
    progress(len(linears), len(linears) + 1, "packing embedding and head")
    _pack_ends(job, planned, packing)
    _keep_rest(packing)
    progress(len(linears) + 1, len(linears) + 1, "packed")
    return packing


@dataclass(frozen=True)
class Stored:
    """A packed linear and where it is applied."""

    name: str
    node: onnx.NodeProto
    packed: PackedTensor

    @property
    def is_plain(self) -> bool:
        """Dense f32 is a plain MatMul."""
        return self.packed.layout == "dense" and self.packed.value_type == "f32"


def _packed(job: Job, tensor: PlannedTensor) -> PackedTensor:
    """A linear in the planned layout."""
    name, mask, grid = tensor.name, job.mask(tensor.name), job.grid(tensor.name)
    options = packing_options(job, tensor)
    if grid is not None:
        options = grid.fitted(options, mask.shape[1])
    with storing(tensor):
        return LAYOUTS[tensor.layout].pack(job.checkpoint.array(f"{name}.weight"), mask, options)


def _place(packing: Packing, group: list[Stored]) -> None:
    """Replace the nodes of linears with the same input: by one node if they are stored alike.

    One node rounds the activations once for all of them, and starts the threads once. Of gate and up it also
    makes their product, so that nothing writes and reads them in between.
    """
    first = group[0]
    alike = all(
        not stored.is_plain
        and stored.node.input[0] == first.node.input[0]
        and op_type(stored.packed) == op_type(first.packed)
        and attributes(stored.packed) == attributes(first.packed)
        for stored in group
    )
    together = [group] if alike and len(group) <= MOST_WEIGHTS else [[stored] for stored in group]
    gating = _gating(packing, group) if alike else None
    for node in gating.nodes if gating else ():
        replace_node(packing.graph, node, [])
    for members in together:
        nodes = [_matmul(packing, members, gating)]
        for stored in members:
            bias = _bias(stored.node)
            if bias:
                output = stored.node.output[0]
                nodes.append(
                    helper.make_node("Add", [_target(stored), bias], [output], name=f"{stored.name}.bias_add")
                )
        for stored in members[1:]:
            replace_node(packing.graph, stored.node, [])
        replace_node(packing.graph, members[0].node, nodes)


def _gating(packing: Packing, group: list[Stored]) -> Gating | None:
    """What the graph does with gate and up, if one node can do it: without biases, and with SiLU."""
    if len(group) != GATED_WEIGHTS or any(_bias(stored.node) for stored in group):
        return None
    return find_gating(packing.graph, *(_target(stored) for stored in group))


def _bias(node: onnx.NodeProto) -> str:
    """The bias of a Gemm, or nothing; it becomes an Add."""
    return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""


def _target(stored: Stored) -> str:
    """Name of the product, before a bias is added."""
    return f"{stored.name}.product" if _bias(stored.node) else stored.node.output[0]


def _matmul(packing: Packing, members: list[Stored], gating: Gating | None) -> onnx.NodeProto:
    """The node for one or several packed tensors, named after the first module."""
    first = members[0]
    x, outputs = first.node.input[0], [_target(stored) for stored in members]
    outputs = [gating.output] if gating else outputs
    if first.is_plain:
        weight = packing.writer.add(f"{first.name}.weight", first.packed.arrays["values"].T)
        return helper.make_node("MatMul", [x, weight], outputs, name=first.name)
    inputs = [
        packing.writer.add(f"{stored.name}.{part}", array)
        for stored in members
        for part, array in stored.packed.arrays.items()
    ]
    name = "+".join([first.name, *(stored.name.rpartition(".")[2] for stored in members[1:])])
    return _packed_node(packing, name, first.packed, [x, *inputs], outputs, gated=gating is not None)


def _packed_node(
    packing: Packing,
    name: str,
    packed: PackedTensor,
    inputs: list[str],
    outputs: list[str],
    *,
    gated: bool = False,
) -> onnx.NodeProto:
    weights = GATED_WEIGHTS if gated else len(outputs)
    kind, unpadded = op_type(packed, weights, gated=gated), LAYOUTS[packed.layout].unpadded(packed)
    before = packing.used.get(kind)
    unpadded = unpadded and (before is None or before.unpadded)
    packing.used[kind] = Operator(packed, weights, gated, unpadded)
    node = helper.make_node(kind, inputs, outputs, name=name, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes(packed).items())
    return node


def _pack_ends(job: Job, planned: Mapping[str, PlannedTensor], packing: Packing) -> None:
    """Store embedding and head as planned; a tied pair shares one set of initializers."""
    checkpoint = job.checkpoint
    for name, (stored_as, shape) in job.other.items():
        tensor, table = planned[name], checkpoint.array(stored_as)
        options = packing_options(job, tensor)
        gather = find_embedding(packing.graph, stored_as) if name == checkpoint.family.embedding else None
        is_head = checkpoint.tied or name == checkpoint.family.head
        head = find_head(packing.graph, stored_as) if is_head else None
        if (gather is None and name == checkpoint.family.embedding) or (head is None and is_head):
            raise InputError(
                f"The ONNX graph of this model does not use {stored_as} as expected.",
                hint="Report this with the model's config.json.",
            )
        with storing(tensor):
            packed = LAYOUTS[tensor.layout].pack(table, np.ones(shape, np.bool_), options)
        packing.others.append(TensorRecord.of(name, packed, tensor.reason))
        if options.value_type == "f32":
            _name_nodes(checkpoint, gather, head)
            continue
        stored = [packing.writer.add(f"{name}.{part}", array) for part, array in packed.arrays.items()]
        if gather is not None:
            replace_node(packing.graph, gather, lookup(packing.writer, name, packed, stored, gather))
        if head is not None:
            inputs, outputs = [head.input[0], *stored], [head.output[0]]
            by = _packed_node(packing, checkpoint.family.head, packed, inputs, outputs)
            replace_node(packing.graph, head, [by])


def _name_nodes(checkpoint: Checkpoint, gather: onnx.NodeProto | None, head: onnx.NodeProto | None) -> None:
    """f32 ends stay as the graph source wrote them; the nodes get the modules' names."""
    if gather is not None:
        gather.name = checkpoint.family.embedding
    if head is not None:
        head.name = checkpoint.family.head


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
