"""Qwen2: biases on q, k and v."""

from .base import Architecture, decoder_parts, register

BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QWEN2 = register(Architecture("qwen2", ("qwen2",), decoder_parts(biases=BIASES)))
