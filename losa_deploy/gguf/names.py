"""What is called how in a GGUF: keys, and the tensors of a decoder beside their Hugging Face names.

The one table of both. Architectures of llama.cpp with other parts extend it where they are described
(`exporters/gguf/architectures/`).
"""

from __future__ import annotations

from collections.abc import Mapping

ARCHITECTURE = "general.architecture"
LICENSE = "general.license"
PREFIX = "losa."
"""Of our own keys, and of the tensors that are packed weights."""
PACKED = "losa-packed"
"""Architecture of a packed file: stock tools name it when they refuse the file."""

EMBEDDING, FINAL_NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
BLOCKS = "blk."
"""Start of the tensors of blocks."""
PARTS: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a Llama-shaped block → its name in a GGUF, in the order in which we write them."""
LINEARS: Mapping[str, str] = {module: part for module, part in PARTS.items() if module.endswith("_proj")}
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms over single heads, which only some architectures have."""


def block_tensor(block: int, part: str, end: str = "weight") -> str:
    """Name of a tensor of a block, e.g. `blk.0.attn_q.weight`."""
    return f"{BLOCKS}{block}.{part}.{end}"
