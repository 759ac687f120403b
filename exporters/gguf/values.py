"""Weights in llama.cpp's own types, holding exactly the values of our formats.

Q8_0 repeats the scale of a row in all of its blocks, so that it means what our i8 means and can be packed
again without loss; Q4_0 is our i4 with groups of 32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.dense import VALUE_TYPES
from losa_deploy.gguf.types import WeightType
from losa_deploy.layouts import PackOptions
from losa_deploy.layouts.values import quantize
from losa_deploy.model import WeightGrid


def pack_options(value_type: str, group_size: int) -> PackOptions:
    """Row scales are f16, as Q8_0 has them."""
    return PackOptions(value_type, group_size, scale_type="f16", search=True)


def encode(
    weight: NDArray[np.float32], kind: WeightType, grid: WeightGrid | None = None
) -> NDArray[np.uint8]:
    """Weight [out, in] → bytes [out, row bytes] of a tensor of type `kind`, on `grid` if that fits the type.

    Raises `ValueError` for values that the type cannot hold.
    """
    rows, columns = weight.shape
    options = pack_options(VALUE_TYPES[kind], kind.weights)
    codes, meaning = quantize(weight, options if grid is None else grid.fitted(options, columns))
    scales = meaning["scale"].astype(np.float16).reshape(rows, -1) if "scale" in meaning else None
    return kind.encode(meaning["table"][codes] if "table" in meaning else codes, scales)
