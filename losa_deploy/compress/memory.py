"""How much memory a run may take, and what the parts of a model take.

Results depend on it by rounding at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from losa_deploy.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

FROZEN_BYTES = 6
"""Per weight of a model in memory whose norms train: f32 weight, mask, level."""
LIBRARY_BYTES = 450_000_000
"""What torch and transformers take before a model is read."""


def available_bytes(device: torch.device | None = None) -> int:
    """Four fifths of what this machine has free, or a GPU with its own memory."""
    import psutil

    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) * 4 // 5
    return int(psutil.virtual_memory().available) * 4 // 5


def block_parameters(source: Checkpoint) -> int:
    """Parameters of the largest block."""
    return max(_by_block(source).values())


def outer_parameters(source: Checkpoint) -> int:
    """Parameters outside of the blocks: embedding, head if it is one of its own, last norm."""
    inside = f"{source.family.blocks}."
    return sum(prod(source.shape(name)) for name in source.files if not name.startswith(inside))


def all_parameters(source: Checkpoint) -> int:
    """Parameters of the model."""
    return outer_parameters(source) + sum(_by_block(source).values())


def _by_block(source: Checkpoint) -> Mapping[int, int]:
    inside, found = f"{source.family.blocks}.", dict.fromkeys(range(source.block_count), 0)
    for name in source.files:
        if name.startswith(inside):
            found[int(name[len(inside) :].split(".")[0])] += prod(source.shape(name))
    return found


def cache_bytes(config: Mapping[str, object], length: int, element: int) -> int:
    """Keys and values of one sequence of `length` tokens, `element` bytes per number."""
    numbers = {key: value for key, value in config.items() if isinstance(value, int)}
    heads = numbers["num_attention_heads"]
    size = numbers.get("head_dim") or numbers["hidden_size"] // heads
    shared = numbers.get("num_key_value_heads") or heads
    return 2 * numbers["num_hidden_layers"] * shared * size * length * element
