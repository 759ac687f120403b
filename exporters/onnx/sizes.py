"""What `model.onnx` and its data file take: packed tensors and functions exactly, other nodes nearly.

The graph itself does not exist yet when a plan is made. What the builder writes for a block was counted
once: its names are the same in all models. A graph that is traced (`graph.dense_graph` says when) is larger
and differs from model to model, so there the size of `model.onnx` is rough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import onnx

from losa_deploy.attention import head_size, model_config
from losa_deploy.interfaces import PlannedTensor
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions
from losa_deploy.layouts.operator_names import attributes, op_type
from losa_deploy.sources.checkpoint import Checkpoint

from .functions import function
from .graph import can_build
from .writer import INLINE_BYTES, external, padded

GATED_WEIGHTS = 2
"""Gate and up."""

BLOCK_TEXT = 1840
"""Of a block without biases: two norms, attention, and what is between the products of the MLP."""
GATING_TEXT = 466
"""Of the latter what a node that gates makes needless."""
PORTS_TEXT = 366
"""Inputs and outputs of the graph that hold the keys and values of a block."""
NORM_TEXT, BIAS_TEXT = 600, 190
"""A norm over heads, and a bias."""
BASE_TEXT = 2250
"""Everything outside of the blocks: the mask, the embedding, the other inputs and outputs, properties."""
LOOKUP_TEXT = 420
"""What more it takes to look tokens up in a table that is not f32."""
TRACED_TEXT = 150_000
"""Nodes of a block of a traced graph, with the traces that torch notes in them."""
NODE_TEXT, OUTPUT_TEXT, ATTRIBUTE_TEXT = 73, 43, 22
"""A packed node without its name and its weights; each of its outputs; each of its attributes."""


@dataclass
class Sizes:
    """Adds up what a writer would write, without the arrays."""

    graph: int = 0
    data: int = 0
    used: dict[str, tuple[PackedTensor, int, bool, bool]] = field(default_factory=dict)
    """Operator → a tensor like those it is for, its weights, does it gate, are all of them unpadded."""

    def add(self, name: str, size: int) -> None:
        """An initializer of so many bytes."""
        if size <= INLINE_BYTES:
            self.graph += _message(
                onnx.TensorProto(name=name, dims=(size,), data_type=1).ByteSize() + size + 4
            )
            return
        offset = padded(self.data)
        self.graph += _message(external(name, (size,), np.dtype(np.uint8), offset).ByteSize())
        self.data = offset + size

    def node(self, names: Sequence[str], packed: PackedTensor, *, gated: bool = False) -> None:
        """The node that multiplies by weights stored alike, and gates if these are gate and up."""
        kind, unpadded = op_type(packed, len(names), gated=gated), LAYOUTS[packed.layout].unpadded(packed)
        *_, before = self.used.get(kind, (packed, 0, gated, True))
        self.used[kind] = (packed, len(names), gated, before and unpadded)
        self.graph += NODE_TEXT + len(names[0]) + OUTPUT_TEXT * (1 if gated else len(names))
        self.graph -= GATING_TEXT if gated else 0
        self.graph += ATTRIBUTE_TEXT * len(attributes(packed))
        self.graph += sum(len(name) + len(part) + 3 for name in names for part in packed.arrays)


def file_sizes(
    checkpoint: Checkpoint,
    groups: Iterable[Sequence[PlannedTensor]],
    tables: Sequence[PlannedTensor],
    parts: Mapping[str, Mapping[str, int]],
    options: Mapping[str, PackOptions],
    *,
    plain: bool,
) -> tuple[int, int]:
    """Bytes of `model.onnx` and of its data file.

    `groups` are linears with the same input; `parts` says how many bytes each component of a tensor takes,
    and `options` how it is packed. `plain`: the graph is to have standard operators only.
    """
    sizes = Sizes()
    for group in groups:
        for tensor in group:
            _add_parts(sizes, tensor, parts[tensor.name])
        gates = len(group) == GATED_WEIGHTS and _gates(checkpoint, group, plain=plain)
        _add_nodes(sizes, [(tensor, options[tensor.name]) for tensor in group], gates=gates)
    for tensor in tables:
        _add_parts(sizes, tensor, parts[tensor.name])
        if tensor.value_type != "f32":
            sizes.node([tensor.name], like(tensor, options[tensor.name]))
            sizes.graph += LOOKUP_TEXT if tensor.name == checkpoint.family.embedding else 0
    _add_rest(sizes, checkpoint, parts, plain=plain)
    for packed, weights, gated, unpadded in sizes.used.values():
        sizes.graph += _message(function(packed, weights, gated=gated, unpadded=unpadded).ByteSize())
    return sizes.graph, sizes.data


def like(tensor: PlannedTensor, options: PackOptions) -> PackedTensor:
    """A tensor of zeros that is stored like a planned one, and says that it has its shape."""
    layout = LAYOUTS[tensor.layout]
    n, m = options.pattern or (2, 4)
    columns = np.arange(16 * m)
    masks = (columns >= 0, columns % m < n, columns % 4 % 3 == 0)
    wide = [np.ascontiguousarray(np.broadcast_to(mask, (16, 16 * m))) for mask in masks]
    mask = next(mask for mask in wide if layout.tolerates(mask, options))
    packed = layout.pack(np.zeros(mask.shape, np.float32), mask, options)
    return replace(packed, shape=tensor.shape)


def _add_parts(sizes: Sizes, tensor: PlannedTensor, parts: Mapping[str, int]) -> None:
    for part, size in parts.items():
        if size:
            sizes.add(f"{tensor.name}.{part}", size)


def _gates(checkpoint: Checkpoint, group: Sequence[PlannedTensor], *, plain: bool) -> bool:
    """Whether one node can multiply by these two and gate: SiLU in the builder's graph, without biases."""
    biases = any(f"{tensor.name}.bias" in checkpoint.files for tensor in group)
    silu = getattr(model_config(checkpoint.config), "hidden_act", None) in ("silu", "swish")
    return silu and not biases and not plain and can_build(checkpoint)


def _add_nodes(
    sizes: Sizes, group: Sequence[tuple[PlannedTensor, PackOptions]], *, gates: bool = False
) -> None:
    """One node for linears that are stored alike, else one for each; dense f32 is a plain MatMul."""
    plain = {tensor.name for tensor, _ in group if (tensor.layout, tensor.value_type) == ("dense", "f32")}
    sizes.graph += sum(NODE_TEXT + OUTPUT_TEXT + 2 * len(name) for name in plain)
    found = {tensor.name: like(tensor, options) for tensor, options in group if tensor.name not in plain}
    kinds = {(op_type(packed), *attributes(packed).items()) for packed in found.values()}
    if len(kinds) == 1 and not plain:
        sizes.node(list(found), found[group[0][0].name], gated=gates)
        return
    for name, packed in found.items():
        sizes.node([name], packed)


def _add_rest(
    sizes: Sizes, checkpoint: Checkpoint, stored: Mapping[str, Mapping[str, int]], *, plain: bool
) -> None:
    """The vectors of the model, rotary tables, and the nodes around the linears."""
    unread = f"{checkpoint.family.head}.weight" if checkpoint.tied else ""
    for name in checkpoint.files:
        if name != unread and name.removesuffix(".weight") not in stored:
            sizes.add(name, 4 * prod(checkpoint.shape(name)))
    built = not plain and can_build(checkpoint)
    vectors = [name for name in checkpoint.files if name.startswith(f"{checkpoint.family.blocks}.")]
    vectors = [name for name in vectors if len(checkpoint.shape(name)) == 1]
    biases = sum(name.endswith("bias") for name in vectors)
    norms = len(vectors) - biases - 2 * checkpoint.block_count
    text = BLOCK_TEXT if built else TRACED_TEXT
    sizes.graph += BASE_TEXT + (text + PORTS_TEXT) * checkpoint.block_count
    sizes.graph += BIAS_TEXT * biases + NORM_TEXT * max(0, norms)
    if built:
        config = model_config(checkpoint.config)
        for name in ("cos_cache", "sin_cache"):
            sizes.add(name, 4 * config.max_position_embeddings * (head_size(config) // 2))


def _message(size: int) -> int:
    """A part of a message, with its tag and length."""
    return size + 1 + max(1, -(-size.bit_length() // 7))
