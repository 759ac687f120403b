"""Products in bf16 while training, where the CPU computes them faster; sums and weights stay f32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers itself (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def uses_bf16(precision: str) -> bool:
    """What a recipe's `precision` (`auto`, `f32` or `bf16`) means on this CPU."""
    return precision == "bf16" or (precision == "auto" and has_bf16())


def products(precision: str) -> AbstractContextManager[object]:
    """A context in which matmuls take bf16 numbers, if `uses_bf16`."""
    if uses_bf16(precision):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()
