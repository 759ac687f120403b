"""A decoder of the Llama shape as a graph: what onnxruntime-genai's builder writes, with random weights.

All contenders share it; only the linears differ. The embedding is i8 for everyone: it is looked up,
not streamed, so it costs no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from losa_deploy.progress import Progress

from .graphs import F32, I32, I64, GraphWriter
from .linears import MICROSOFT, Linear, Site
from .tensors import Pruning, RandomWeight, Storage

CONTEXT = 2048
THETA = 10_000.0
EPSILON = 1e-5
EMBEDDING = Storage("dense", "i8")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    """The head is the embedding, where a contender can share it."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Linears of one block, name → (out, in)."""
        hidden, kv = self.hidden, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }

    @property
    def block_weights(self) -> int:
        """Weights of all block linears."""
        return self.blocks * sum(rows * columns for rows, columns in self.linears.values())

    def estimate(self, kind: Linear) -> int:
        """Bytes of the model files, rounded up."""
        table = self.vocab * self.hidden
        head = table * (min(kind.bits, 32.0) if kind.name != "ours" else 8.0) / 8
        return int(1.05 * (self.block_weights * kind.bits / 8 + table + head)) + (1 << 20)


def write_decoder(
    geometry: Geometry,
    kind: Linear,
    graph: GraphWriter,
    pruning: Pruning,
    progress: Progress,
) -> None:
    """Append the whole model to `graph` and finish it."""
    steps = geometry.blocks + 1
    lengths = _lengths(graph)
    caches = _rotary(graph, geometry)
    table = RandomWeight((geometry.vocab, geometry.hidden), 0.0, seed=pruning.seed)
    hidden, shared = _embedding(graph, table)
    skip = ""
    for block in range(geometry.blocks):
        progress(block, steps, f"writing {kind.name}")
        # Every tensor has values of its own: of blocks with equal bytes ONNX Runtime kept one in memory
        # (peak RSS 248 MB for 616 MB of int4 weights), which the caches half hold.
        first = pruning.seed + 1 + block * len(geometry.linears)
        weights = {
            name: pruning.weight(shape, seed)
            for seed, (name, shape) in enumerate(geometry.linears.items(), first)
        }
        hidden, skip = _block(graph, geometry, kind, block, (hidden, skip), weights, (*lengths, *caches))
    progress(geometry.blocks, steps, f"writing {kind.name}")
    normed, _ = _norm(graph, geometry, "model.norm", hidden, skip)
    kind.write(graph, [Site("lm_head", normed, "logits", table, shared if geometry.tied else {}, head=True)])
    _finish(graph, geometry)
    progress(steps, steps, "done")


def _lengths(graph: GraphWriter) -> tuple[str, str]:
    """Length of the past per sequence, and the longest total, as GroupQueryAttention wants them."""
    one = graph.tensor("one", np.array([1], np.int64))
    total = graph.op("ReduceSum", ["attention_mask", one], ["lengths.total"], keepdims=0)
    graph.op("Sub", [total, one], ["lengths.last"])
    past = graph.op("Cast", ["lengths.last"], ["lengths.past"], to=I32)
    graph.op("Shape", ["attention_mask"], ["lengths.shape"])
    axis = graph.tensor("axis", np.array(1, np.int64))
    graph.op("Gather", ["lengths.shape", axis], ["lengths.longest"], axis=0)
    return past, graph.op("Cast", ["lengths.longest"], ["lengths.longest32"], to=I32)


def _rotary(graph: GraphWriter, geometry: Geometry) -> tuple[str, str]:
    half = geometry.head_dim // 2
    angles = np.outer(np.arange(CONTEXT), THETA ** (-np.arange(half) / half))
    cosine = graph.tensor("cos_cache", np.cos(angles).astype(np.float32))
    return cosine, graph.tensor("sin_cache", np.sin(angles).astype(np.float32))


def _embedding(graph: GraphWriter, table: RandomWeight) -> tuple[str, dict[str, str]]:
    """Look up rows of i8 levels and their scales; also the names of both initializers."""
    packed = table.pack(EMBEDDING)
    names = {part: graph.tensor(f"model.embed_tokens.{part}", a) for part, a in packed.arrays.items()}
    last = graph.tensor("last", np.array([-1], np.int64))
    graph.op("Gather", [names["values"], "input_ids"], ["embed.levels"], axis=0)
    graph.op("Gather", [names["scale"], "input_ids"], ["embed.scale"], axis=0)
    graph.op("Unsqueeze", ["embed.scale", last], ["embed.scales"])
    graph.op("Cast", ["embed.levels"], ["embed.float"], to=F32)
    return graph.op("Mul", ["embed.float", "embed.scales"], ["embed"]), names


def _block(
    graph: GraphWriter,
    geometry: Geometry,
    kind: Linear,
    block: int,
    streams: tuple[str, str],
    weights: Mapping[str, RandomWeight],
    extras: tuple[str, ...],
) -> tuple[str, str]:
    """One decoder block; takes and returns (new summand, residual stream without it)."""
    prefix = f"model.layers.{block}"

    def site(name: str, x: str) -> Site:
        return Site(f"{prefix}.{name}", x, f"{prefix}.{name}.out", weights[name])

    def linears(x: str, *names: str, packed: bool = False) -> list[str]:
        return kind.write(graph, [site(name, x) for name in names], packed=packed)

    normed, residual = _norm(graph, geometry, f"{prefix}.input_layernorm", *streams)
    heads = linears(normed, *(f"self_attn.{part}_proj" for part in "qkv"), packed=True)
    heads += [""] * (3 - len(heads))
    past = [f"past_key_values.{block}.{part}" for part in ("key", "value")]
    present = [f"present.{block}.{part}" for part in ("key", "value")]
    attended = graph.op(
        "GroupQueryAttention",
        [*heads, *past, *extras],
        [f"{prefix}.attention", *present],
        MICROSOFT,
        num_heads=geometry.heads,
        kv_num_heads=geometry.kv_heads,
        scale=geometry.head_dim**-0.5,
        local_window_size=-1,
        do_rotary=1,
        rotary_interleaved=0,
    )
    (attention,) = linears(attended, "self_attn.o_proj")
    normed, residual = _norm(graph, geometry, f"{prefix}.post_attention_layernorm", attention, residual)
    gate, up = (site(f"mlp.{part}_proj", normed) for part in ("gate", "up"))
    product = kind.write_gated(graph, gate, up, f"{prefix}.mlp.product")
    (down,) = linears(product, "mlp.down_proj")
    return down, residual


def _norm(graph: GraphWriter, geometry: Geometry, name: str, summand: str, residual: str) -> tuple[str, str]:
    """(Normed sum, sum); without a residual the summand is the sum."""
    weight = graph.tensor(f"{name}.weight", np.ones(geometry.hidden, np.float32))
    if not residual:
        out = graph.op(
            "SimplifiedLayerNormalization", [summand, weight], [name], epsilon=EPSILON, axis=-1, stash_type=1
        )
        return out, summand
    outputs = [name] if name == "model.norm" else [name, "", "", f"{name}.sum"]
    inputs = [residual, summand, weight]
    graph.op("SkipSimplifiedLayerNormalization", inputs, outputs, MICROSOFT, epsilon=EPSILON)
    return name, outputs[-1]


def _finish(graph: GraphWriter, geometry: Geometry) -> None:
    inputs: dict[str, tuple[int, list[str | int]]] = {
        "input_ids": (I64, ["batch_size", "sequence_length"]),
        "attention_mask": (I64, ["batch_size", "total_sequence_length"]),
    }
    outputs: dict[str, tuple[int, list[str | int]]] = {
        "logits": (F32, ["batch_size", "sequence_length", geometry.vocab])
    }
    kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
    for block in range(geometry.blocks):
        for part in ("key", "value"):
            past: list[str | int] = ["batch_size", kv_heads, "past_sequence_length", head_dim]
            present: list[str | int] = ["batch_size", kv_heads, "total_sequence_length", head_dim]
            inputs[f"past_key_values.{block}.{part}"] = (F32, past)
            outputs[f"present.{block}.{part}"] = (F32, present)
    graph.finish(inputs, outputs)
