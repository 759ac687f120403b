"""How each contender stores and computes a linear: ours, and what people run otherwise in ONNX Runtime.

Everything else of the graph is the same for all. Each class has a `name`, the `bits` it stores per
weight (for the estimate of the disk it needs), and `write`, which appends the nodes of linears that
read the same input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts import VALUE_TYPES
from losa_deploy.layouts.base import Component, PackedTensor
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type

from .graphs import F32, GraphWriter
from .tensors import RandomWeight, Storage

OURS = "ours"
"""Name of our pruned model in results."""
MICROSOFT = "com.microsoft"
BLOCK_SIZE = 128
"""Weights per scale of MatMulNBits: the group size of our i4."""
ACCURACY_LEVEL = 4
"""MatMulNBits rounds the activations to int8, its fastest mode."""


@dataclass(frozen=True)
class Site:
    """One linear of the graph: Y = X @ W.T."""

    name: str
    """Prefix of the initializers, e.g. `model.layers.0.mlp.up_proj`."""
    x: str
    y: str
    weight: RandomWeight
    shared: Mapping[str, str] = field(default_factory=dict)
    """Initializers of a tied embedding (i8: values, scale) that a head may use as they are."""
    head: bool = False


class Linear(Protocol):
    """One way to store and compute linears. An object serves one model."""

    name: str
    bits: float
    """Stored bits per weight, roughly."""

    def describe(self) -> dict[str, object]:
        """What decides the bytes of a model, for reuse."""
        ...

    def write(self, graph: GraphWriter, sites: Sequence[Site], *, packed: bool = False) -> list[str]:
        """Append the nodes and initializers of linears with the same input; returns their outputs.

        With `packed` the reader also takes all of them in one output, one after another.
        """
        ...

    def write_gated(self, graph: GraphWriter, gate: Site, up: Site, output: str) -> str:
        """Append what makes `output` = SiLU(gate) * up of two linears with the same input; returns it."""
        ...


def write_gating(graph: GraphWriter, gate: str, up: str, output: str) -> str:
    """SiLU(gate) * up in standard operators."""
    graph.op("Sigmoid", [gate], [f"{gate}.sigmoid"])
    graph.op("Mul", [gate, f"{gate}.sigmoid"], [f"{gate}.silu"])
    return graph.op("Mul", [f"{gate}.silu", up], [output])


@dataclass(frozen=True)
class UsedOperator:
    """An operator of `ai.losa` in a model."""

    packed: PackedTensor
    """One tensor that it was used with."""
    weights: int
    gated: bool


class Ours:
    """Operators of `ai.losa`, run by our library; a dense i8 head may be the tied embedding.

    As in an exported model, linears with the same input share one node, which also gates, and dense f32 is a
    plain MatMul.
    """

    def __init__(self, storage: Storage, head: Storage, name: str = OURS) -> None:
        self._storage, self._head, self.name = storage, head, name
        self._plain = OrtFp32()
        self.operators: dict[str, UsedOperator] = {}
        """By name."""
        kept = VALUE_TYPES[storage.value_type].bits * 1.05 * (1 - storage.sparsity)  # scales included
        self.bits = kept if storage.layout == "dense" else kept + min(2.0, 1.0 + kept)

    def describe(self) -> dict[str, object]:
        storage = self._storage
        return {"linears": storage.label, "group_size": storage.group_size, "head": self._head.label}

    def write(self, graph: GraphWriter, sites: Sequence[Site], *, packed: bool = False) -> list[str]:
        storage = self._head if sites[0].head else self._storage
        if _is_plain(storage):
            return self._plain.write(graph, sites)
        return self._write(graph, sites, storage, [site.y for site in sites])

    def write_gated(self, graph: GraphWriter, gate: Site, up: Site, output: str) -> str:
        if _is_plain(self._storage):
            return self._plain.write_gated(graph, gate, up, output)
        return self._write(graph, [gate, up], self._storage, [output], gated=True)[0]

    def _write(
        self,
        graph: GraphWriter,
        sites: Sequence[Site],
        storage: Storage,
        outputs: list[str],
        *,
        gated: bool = False,
    ) -> list[str]:
        tensors = [site.weight.pack(storage) for site in sites]
        operator = op_type(tensors[0], len(sites), gated=gated)
        self.operators[operator] = UsedOperator(tensors[0], len(sites), gated)
        as_embedding = storage.value_type == "i8"  # of embeddings, which a tied head shares
        inputs = [
            site.shared[part]
            if part in site.shared and as_embedding
            else graph.tensor(f"{site.name}.{part}", array)
            for site, tensor in zip(sites, tensors, strict=True)
            for part, array in tensor.arrays.items()
        ]
        graph.op(operator, [sites[0].x, *inputs], outputs, DOMAIN, **attributes(tensors[0]))
        return outputs


def _is_plain(storage: Storage) -> bool:
    return (storage.layout, storage.value_type) == ("dense", "f32")


Weights = tuple[RandomWeight, ...]
"""Stored below each other as one: mostly one, or q, k and v."""


class _Peer:
    """A peer. As onnxruntime-genai's builder does it, q, k and v are one matrix, gate and up are two."""

    def write(self, graph: GraphWriter, sites: Sequence[Site], *, packed: bool = False) -> list[str]:
        groups = [sites] if packed else [[site] for site in sites]
        return [self._write_group(graph, group) for group in groups]

    def write_gated(self, graph: GraphWriter, gate: Site, up: Site, output: str) -> str:
        first, second = self.write(graph, [gate, up])
        return write_gating(graph, first, second, output)

    def _write_group(self, graph: GraphWriter, sites: Sequence[Site]) -> str:
        weights = tuple(site.weight for site in sites)
        name = "+".join([sites[0].name, *(site.name.rpartition(".")[2] for site in sites[1:])])
        parts = self.make(weights).items()
        stored = {part: graph.tensor(f"{name}.{part}", array) for part, array in parts}
        output = sites[0].y if len(sites) == 1 else f"{name}.out"
        shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
        self.connect(graph, sites[0].x, output, stored, shape)
        return output

    def make(self, weights: Weights) -> Mapping[str, Component]:
        """Stored arrays."""
        raise RuntimeError("no arrays for this kind of linear")

    def connect(
        self, graph: GraphWriter, x: str, y: str, stored: Mapping[str, str], shape: tuple[int, int]
    ) -> None:
        """Nodes from `x` to `y` that use the stored arrays of a weight of `shape` (out, in)."""
        raise RuntimeError("no nodes for this kind of linear")


class OrtFp32(_Peer):
    """An ordinary MatMul, the weight stored as [in, out]."""

    name = "ort-fp32"
    bits = 32.0

    def describe(self) -> dict[str, object]:
        return {}

    def make(self, weights: Weights) -> Mapping[str, Component]:
        columns = [weight.matrix().T for weight in weights]
        return {"weight": np.concatenate(columns, axis=1)}

    def connect(
        self, graph: GraphWriter, x: str, y: str, stored: Mapping[str, str], shape: tuple[int, int]
    ) -> None:
        graph.op("MatMul", [x, stored["weight"]], [y])


class OrtInt4(_Peer):
    """MatMulNBits: symmetric int4 with a scale per 128 weights, activations rounded to int8."""

    name = "ort-int4"
    bits = 4.0 + 32.0 / BLOCK_SIZE
    width = 4
    """Bits of a level."""

    def describe(self) -> dict[str, object]:
        return {"block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}

    def make(self, weights: Weights) -> Mapping[str, Component]:
        codes, scales = [], []
        for weight in weights:
            found = quantize_blocks(weight.rows[0], BLOCK_SIZE, self.width)
            codes.append(np.tile(found[0], (weight.repeats, 1, 1)))
            scales.append(np.tile(found[1], (weight.repeats, 1)))
        return {"quantized": np.concatenate(codes), "scales": np.concatenate(scales).reshape(-1)}

    def connect(
        self, graph: GraphWriter, x: str, y: str, stored: Mapping[str, str], shape: tuple[int, int]
    ) -> None:
        options = {"bits": self.width, "block_size": BLOCK_SIZE, "accuracy_level": ACCURACY_LEVEL}
        inputs = [x, stored["quantized"], stored["scales"]]
        graph.op("MatMulNBits", inputs, [y], MICROSOFT, N=shape[0], K=shape[1], **options)


class OrtInt2(OrtInt4):
    """The same with 2 bits: the levels -2, -1, 0 and 1. Old versions of onnxruntime cannot run it."""

    name = "ort-int2"
    bits = 2.0 + 32.0 / BLOCK_SIZE
    width = 2


def quantize_blocks(
    weight: NDArray[np.float32], block: int, bits: int = 4
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Weight [out, in] → codes [out, blocks, bytes], low bits first, and scales [out, blocks].

    A code is the level plus 2^(bits-1), e.g. -8..7 plus 8; the largest weight of a block becomes the lowest
    level exactly.
    """
    lowest, per_byte = -(1 << (bits - 1)), 8 // bits
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    index = np.abs(grouped).argmax(axis=2)[..., None]
    scales = np.take_along_axis(grouped, index, axis=2)[..., 0] / np.float32(lowest)
    safe = np.where(scales == 0, np.float32(1), scales)
    levels = np.clip(np.rint(grouped / safe[..., None]), lowest, -lowest - 1) - lowest
    codes = levels.astype(np.uint8).reshape(rows, blocks, block // per_byte, per_byte)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(codes << places, axis=3), scales.astype(np.float32)


class OrtInt8(_Peer):
    """What `onnxruntime.quantization.quantize_dynamic` makes of a MatMul: int8 with one scale per tensor.

    The activations are quantized once per value, however many linears read it.
    """

    name = "ort-int8"
    bits = 8.0

    def __init__(self) -> None:
        self._quantized: set[str] = set()

    def describe(self) -> dict[str, object]:
        return {}

    def make(self, weights: Weights) -> Mapping[str, Component]:
        scale = np.float32(max(np.abs(weight.rows[0]).max() for weight in weights) / 127)
        columns = []
        for weight in weights:
            levels = np.clip(np.rint(weight.rows[0] / scale), -127, 127).astype(np.int8)
            columns.append(np.tile(levels, (weight.repeats, 1)).T)
        return {
            "quantized": np.concatenate(columns, axis=1),
            "zero_point": np.array(0, np.int8),
            "scale": np.array(scale, np.float32),
        }

    def connect(
        self, graph: GraphWriter, x: str, y: str, stored: Mapping[str, str], shape: tuple[int, int]
    ) -> None:
        codes, scale, zero = (f"{x}.{part}" for part in ("quantized", "scale", "zero_point"))
        if x not in self._quantized:
            self._quantized.add(x)
            graph.op("DynamicQuantizeLinear", [x], [codes, scale, zero])
        product = [codes, stored["quantized"], zero, stored["zero_point"]]
        graph.op("MatMulInteger", product, [f"{y}.integer"])
        graph.op("Cast", [f"{y}.integer"], [f"{y}.float"], to=F32)
        graph.op("Mul", [scale, stored["scale"]], [f"{y}.scale"])
        graph.op("Mul", [f"{y}.float", f"{y}.scale"], [y])


PEERS: Mapping[str, type[OrtFp32] | type[OrtInt4] | type[OrtInt8]] = {
    kind.name: kind for kind in (OrtInt4, OrtInt8, OrtFp32, OrtInt2)
}
"""Name → how that peer computes linears."""
