"""Products in bf16 while training, where the device computes them faster; sums and weights stay f32."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from losa_deploy.compress.device import CPU


def has_bf16(device: torch.device = CPU) -> bool:
    """Whether a device multiplies bf16 numbers itself (CPUs: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def uses_bf16(precision: str, device: torch.device = CPU) -> bool:
    """What a recipe's `precision` (`auto`, `f32` or `bf16`) means on a device."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device))


STORED: Mapping[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
"""A recipe's `streams` → how hidden states are kept between blocks."""


def products(precision: str, device: torch.device = CPU) -> AbstractContextManager[object]:
    """A context in which matmuls on the device take bf16 numbers, if `uses_bf16`."""
    if uses_bf16(precision, device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
