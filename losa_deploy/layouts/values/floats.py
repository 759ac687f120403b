"""f32 and f16: the value itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions
from losa_deploy.layouts.values.base import ValueType, register

F16_MAX = float(np.finfo(np.float16).max)


class _Float(ValueType):
    """A code is the value."""

    def dequantize(
        self, codes: NDArray[np.generic], params: Mapping[str, int], arrays: Mapping[str, Component]
    ) -> NDArray[np.float32]:
        del params, arrays
        plain: NDArray[np.float32] = codes.astype(np.float32)
        return plain


class F32(_Float):
    """Nothing is rounded."""

    name, number, planes = "f32", 0, (32,)
    code = level = np.dtype(np.float32)
    head, ggml = "f32", "F32"
    rounding_kl = kernel_kl = 1e-6

    def quantize(
        self, weight: NDArray[np.float32], options: PackOptions
    ) -> tuple[NDArray[np.generic], dict[str, Component]]:
        del options
        return weight.astype(np.float32), {}

    def error_bound(self, weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
        del group_size
        return np.zeros_like(weight)


class F16(_Float):
    """Rounded once; a magnitude above 65504 is refused."""

    name, number, planes = "f16", 1, (16,)
    code = level = np.dtype(np.float16)
    head, ggml = "f16", "F16"
    rounding_kl = 1e-3
    kernel_kl = 1e-4
    """For the sake of llama.cpp, which rounds its cache and what meets f16 weights to f16."""

    def quantize(
        self, weight: NDArray[np.float32], options: PackOptions
    ) -> tuple[NDArray[np.generic], dict[str, Component]]:
        del options
        if weight.size and float(np.abs(weight).max()) > F16_MAX:
            raise ValueError(f"a weight of magnitude {np.abs(weight).max():g} does not fit f16")
        return weight.astype(np.float16), {}

    def error_bound(self, weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
        """Half a unit in the last place, at least half the smallest subnormal."""
        del group_size
        return np.maximum(np.abs(weight) * 2.0**-11, 2.0**-25).astype(np.float32)


register(F32())
register(F16())
