"""Keys from which llama.cpp builds a graph, by their names without the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from losa_deploy.sources.checkpoint import Checkpoint

from .config import head_count, head_dim, kv_head_count, number, whole
from .rope import Rope

if TYPE_CHECKING:
    from gguf import GGUFWriter

Keys = Mapping[str, bool | int | float | str]
"""In the order of the file; their types become GGUF's bool, uint32, float32 and string."""


def decoder_keys(checkpoint: Checkpoint) -> Keys:
    """Of a decoder with RMS norms, rotary positions and a gated MLP."""
    config, rope = checkpoint.config, Rope.of(checkpoint.config)
    heads, width = head_count(config), head_dim(config)
    wide = width * heads != whole(config, "hidden_size")
    return {
        "block_count": checkpoint.block_count,
        "context_length": whole(config, "max_position_embeddings"),
        "embedding_length": whole(config, "hidden_size"),
        "feed_forward_length": whole(config, "intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_head_count(config),
        "attention.layer_norm_rms_epsilon": number(config, "rms_norm_eps", 1e-6),
        "rope.freq_base": rope.base,
        "rope.dimension_count": width,
        **({"attention.key_length": width, "attention.value_length": width} if wide else {}),
        "vocab_size": checkpoint.shape(f"{checkpoint.family.embedding}.weight")[0],
        **rope.scaling_keys(),
    }


def write_keys(writer: GGUFWriter, keys: Keys) -> None:
    """Write keys below the architecture of the writer."""
    for key, value in keys.items():
        name = f"{writer.arch}.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
