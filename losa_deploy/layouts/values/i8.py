"""i8: levels -127..127 of one scale per row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions
from losa_deploy.layouts.values.base import (
    F16_SCALE,
    F32_SCALE,
    SCALE_ERROR,
    SCALE_FLOOR,
    ValueType,
    divide,
    largest_of_groups,
    register,
)


class I8(ValueType):
    """Symmetric; the scale is the largest magnitude of the row / 127."""

    name, number, planes = "i8", 2, (8,)
    code = level = np.dtype(np.int8)
    levels = (-127, 127)
    scale_types = (F32_SCALE, F16_SCALE)
    head, ggml = "i8", "Q8_0"
    rounding_kl = kernel_kl = 0.05

    def scale_type(self, options: PackOptions) -> int:
        return F32_SCALE if options.scale_type == "f32" else F16_SCALE

    def scale_shape(self, shape: tuple[int, int], group_size: int) -> tuple[int, ...]:
        del group_size
        return (shape[0],)

    def quantize(
        self, weight: NDArray[np.float32], options: PackOptions
    ) -> tuple[NDArray[np.generic], dict[str, Component]]:
        top = np.abs(weight).max(axis=1, initial=0.0)
        kind = np.float32 if options.scale_type == "f32" else np.float16
        found = top / np.float32(127) if options.scales is None else options.scales[:, 0]
        scale = found.astype(kind)
        if not np.isfinite(scale).all():
            raise ValueError(f"a row of magnitude {top.max():g} has a scale that does not fit f16")
        levels = np.rint(divide(weight, scale.astype(np.float32)[:, None]))
        return np.clip(levels, *self.levels).astype(np.int8), {"scale": scale}

    def dequantize(
        self, codes: NDArray[np.generic], params: Mapping[str, int], arrays: Mapping[str, Component]
    ) -> NDArray[np.float32]:
        del params
        scale: NDArray[np.float32] = arrays["scale"].astype(np.float32)
        rows: NDArray[np.float32] = codes.astype(np.float32) * scale[:, None]
        return rows

    def error_bound(self, weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
        """Half a step, and the rounding of the stored scale once per unit of the level."""
        del group_size
        step = largest_of_groups(weight, weight.shape[1]) / np.float32(127)
        bound = 0.5 * step * (1 + SCALE_ERROR) + 127 * (step * SCALE_ERROR + SCALE_FLOOR)
        return bound.astype(np.float32)


register(I8())
