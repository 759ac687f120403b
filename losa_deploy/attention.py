"""How far back each block of a model attends, and which sequence lengths change what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SLIDING = "sliding_attention"
"""What `layer_types` calls a block that attends to a window."""


def model_config(config: Mapping[str, object]) -> PreTrainedConfig:
    """A parsed `config.json` as transformers reads it, with the defaults of its class filled in."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(str(config.get("model_type", "")), **values)
    except Exception as error:  # configurations are checked by classes with exceptions of their own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"transformers cannot read config.json: {reason}.", hint="Copy the model's config.json again."
        ) from error


def head_size(config: PreTrainedConfig) -> int:
    """Width of one head of attention."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def attention_windows(config: Mapping[str, object]) -> tuple[int | None, ...]:
    """Of each block, to how many tokens a token attends, itself included; None if to all before it.

    A window that no sequence outgrows, because the context is not longer, is None too.
    """
    full = model_config(config)
    # A key that the class has not is never read, whatever config.json says.
    window: int | None = full.sliding_window if hasattr(type(full), "sliding_window") else None
    blocks: int = full.num_hidden_layers
    if window is None or window >= full.max_position_embeddings:
        return (None,) * blocks
    if not hasattr(type(full), "layer_types"):
        return (window,) * blocks
    return tuple(window if kind == SLIDING else None for kind in full.layer_types[:blocks])


def original_context(config: Mapping[str, object]) -> int | None:
    """The context that a scaled rotary embedding was trained with, if it is less than the model's."""
    full = model_config(config)
    rope = getattr(full, "rope_parameters", None) or {}
    length = rope.get("original_max_position_embeddings")
    return length if isinstance(length, int) and length < full.max_position_embeddings else None
