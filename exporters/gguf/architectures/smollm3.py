"""SmolLM3: Llama, in which every fourth block has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping

from .base import REFUSALS, Architecture, decoder_parts, register
from .config import whole
from .refusals import only_every_fourth
from .rows import interleaved_heads


def refuse_other_intervals(config: Mapping[str, object]) -> None:
    """Where config.json does not list the blocks, it says every how many one is left out."""
    key = "no_rope_layer_interval"
    if config.get("no_rope_layers") or not config.get(key):
        return
    every = whole(config, key)
    rotated = [int((block + 1) % every != 0) for block in range(whole(config, "num_hidden_layers"))]
    only_every_fourth(config, key, rotated)


SMOLLM3 = register(
    Architecture(
        "smollm3",
        ("smollm3",),
        decoder_parts(),
        row_order=interleaved_heads,
        refusals=(refuse_other_intervals, *REFUSALS),
    )
)
