"""A model family is data: where the blocks and their linears are. No control flow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of the modules of one decoder family, as in its Hugging Face implementation.

    `linears` are relative to a block, in the order in which activations flow through them;
    linears in one inner tuple read the same input (so they share calibration statistics).
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[tuple[str, ...], ...]
    embedding: str
    final_norm: str
    head: str = "lm_head"
    onnx_graph: str = "genai"
    """Which graph source the ONNX exporter uses: `genai` (builder) or `transformers` (exporter)."""

    def block_linears(self) -> tuple[str, ...]:
        """Flat names of the linears of one block, e.g. `self_attn.q_proj` first for Llama."""
        return tuple(name for group in self.linears for name in group)
