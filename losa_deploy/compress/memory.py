"""How much memory a run may take, and what the parts of a model take.

Results depend on it by rounding at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from losa_deploy.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

FROZEN_BYTES = 6
"""Per weight of a model in memory whose norms train: f32 weight, mask, level."""
MOVING_BYTES = 17
"""Per weight of a model in memory whose weights train: f32 weight, mask, gradient, two moments."""
MOVING_BYTES_8BIT = 11
"""The same with moments in eight bits."""
ROUNDED_BYTES = 4
"""More per weight if rounded weights stay until the backward pass."""
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


def activation_bytes(hidden: int, inner: int, tokens: int) -> int:
    """What the backward pass of a block needs of its forward pass, for so many tokens."""
    return 4 * tokens * (10 * hidden + 4 * inner)


def moving_bytes(optimizer: str) -> int:
    """Per weight that trains through the model, by the optimizer of the phase."""
    return MOVING_BYTES_8BIT if optimizer == "adamw8bit" else MOVING_BYTES


def fits_at_once(source: Checkpoint, tokens: int, memory: int, optimizer: str = "adamw") -> bool:
    """Whether weights that train and what all blocks keep for the backward pass are in memory together."""
    inner = max(max(shape) for shape in source.linears.values())
    kept = source.block_count * activation_bytes(int(str(source.config["hidden_size"])), inner, tokens)
    outer = outer_parameters(source)
    moving = (moving_bytes(optimizer) + ROUNDED_BYTES) * (all_parameters(source) - outer)
    return LIBRARY_BYTES + 4 * outer + moving + kept <= memory


def trains_whole(source: Checkpoint, memory: int, optimizer: str = "adamw") -> bool:
    """Whether all weights can train in one process."""
    outer = outer_parameters(source)
    return LIBRARY_BYTES + 4 * outer + moving_bytes(optimizer) * (all_parameters(source) - outer) <= memory


def _by_block(source: Checkpoint) -> Mapping[int, int]:
    inside, found = f"{source.family.blocks}.", dict.fromkeys(range(source.block_count), 0)
    for name in source.files:
        if name.startswith(inside):
            found[int(name[len(inside) :].split(".")[0])] += prod(source.shape(name))
    return found


def cache_bytes(config: Mapping[str, object], length: int, element: int) -> int:
    """For keys and values of one sequence of `length` tokens, `element` bytes per number."""
    numbers = {key: value for key, value in config.items() if isinstance(value, int)}
    heads = numbers["num_attention_heads"]
    size = numbers.get("head_dim") or numbers["hidden_size"] // heads
    shared = numbers.get("num_key_value_heads") or heads
    return 2 * numbers["num_hidden_layers"] * shared * size * length * element
