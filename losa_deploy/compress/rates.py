"""What this machine does in a second, measured for a second or two, of the kinds of work of a compression."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from losa_deploy.compress.decoder import ATTENTION
from losa_deploy.compress.device import CPU, synchronize
from losa_deploy.compress.grid import GridKind
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.precision import products
from losa_deploy.compress.train import Trained
from losa_deploy.phases import PhaseRecipe

MOVED = 1024
"""Rows and columns of the linear that measures steps of training."""
WIDEST = 1024
"""Hidden size of the block that is measured: wider ones multiply at the same rate."""
HEAD = 64
"""Size of its attention heads."""


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    products: float
    """Multiplications and additions of a large matrix product at the recipe's precision."""
    plain: float
    """The same in f32."""
    blocks: float
    """Those of the linears of a block, forward and backward, with all that it computes beside them."""
    elements: float
    """Numbers of a large array that are multiplied by others."""
    moved: float
    """Weights that a step of training rounds, clips and moves, without its products."""


def measured_rates(
    hidden: int, inner: int, *, bf16: bool, device: torch.device = CPU, seconds: float = 0.25
) -> Rates:
    """A quarter of a second of each kind of work on a device, and a second of a block of these widths."""

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.ones(rows, 1024, dtype=dtype, device=device) for rows in (512, 1024))
        return _rate(2.0 * 512 * 1024 * 1024, lambda: torch.nn.functional.linear(a, b), seconds, device)

    x, y = torch.ones(4_000_000, device=device), torch.ones(4_000_000, device=device)
    elements = _rate(x.numel(), lambda: x.mul_(y), seconds, device)
    plain = rate(torch.float32)
    multiplied = rate(torch.bfloat16) if bf16 else plain
    count, step = _block_step(hidden, inner, bf16=bf16, device=device)
    blocks = _rate(count, step, 4 * seconds, device)
    moved = _rate(MOVED**2, _training_step(bf16=bf16, device=device), seconds, device)
    return Rates(multiplied, plain, blocks, elements, moved)


def _block_step(
    hidden: int, inner: int, *, bf16: bool, device: torch.device
) -> tuple[float, Callable[[], object]]:
    """A Llama block of random numbers, forward and backward on two texts of 256 tokens.

    Returns the multiplications and additions of its linears, and the function.
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    width = HEAD * max(1, min(hidden, WIDEST) // HEAD)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=max(1, inner * width // hidden),
        num_attention_heads=width // HEAD,
    )
    config._attn_implementation = ATTENTION
    with device:
        block = LlamaDecoderLayer(config, 0)
        x = torch.linspace(-1.0, 1.0, 512 * width).view(2, 256, width)
        positions = LlamaRotaryEmbedding(config)(x, torch.arange(256)[None])
    weights = [value for value in block.parameters() if value.ndim == 2]

    def step() -> tuple[Tensor, ...]:
        with products("bf16" if bf16 else "f32", device):
            output = block(x, position_embeddings=positions)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(found.float().square().mean(), weights)

    return 6.0 * 512 * sum(value.numel() for value in weights), step


def _training_step(*, bf16: bool, device: torch.device) -> Callable[[], None]:
    """A step of block phases on a linear half of which is kept, on a grid; without the products."""
    weight = torch.linspace(-1.0, 1.0, MOVED * MOVED, device=device).view(MOVED, MOVED)
    linear = MaskedLinear(weight, None, weight > 0)
    phase = PhaseRecipe(train=("weights", "scales"), grid="i4", group_size=128)
    linear.grid, scales = GridKind.of("i4", 128), weight.new_full((MOVED, MOVED // 128), 0.1)
    linear.scales = torch.nn.Parameter(scales, requires_grad=False)
    trained = Trained([linear], phase)
    optimizer = torch.optim.AdamW(trained.groups, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with products("bf16" if bf16 else "f32", device):
            rounded = linear.on_grid()
        rounded.backward(torch.ones_like(rounded))  # type: ignore[no-untyped-call]
        trained.clip(1.0)
        trained.step(optimizer)

    return step


def _rate(count: float, work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """`count` per second that a call of `work` does."""
    work()
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        synchronize(device)
        calls += 1
    return count * calls / (time.perf_counter() - start)
