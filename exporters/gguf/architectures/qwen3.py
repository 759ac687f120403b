"""Qwen3: a norm over each head of q and k, no biases."""

from .base import Architecture, decoder_parts, register

QWEN3 = register(Architecture("qwen3", ("qwen3",), decoder_parts(head_norms=True)))
