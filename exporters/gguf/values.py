"""Weights in llama.cpp's own types, holding exactly the values of our formats.

Q8_0 repeats the scale of a row in all of its blocks, so that it means what our i8 means and can be packed
again without loss; Q4_0 is our i4 with groups of 32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.file import F16, F32, Q4_0, Q8_0
from losa_deploy.layouts import PackOptions
from losa_deploy.layouts.values import quantize
from losa_deploy.model import WeightGrid

BLOCK = 32
DENSE_TYPES: dict[str, int] = {"i8": Q8_0, "i4": Q4_0, "f16": F16, "f32": F32}
"""Value type → tensor type of a dense weight."""
VALUE_TYPES: dict[int, str] = {kind: name for name, kind in DENSE_TYPES.items()}


def pack_options(value_type: str, group_size: int) -> PackOptions:
    """Row scales are f16, as Q8_0 has them."""
    return PackOptions(value_type, group_size, scale_type="f16", search=True)


def scale_group(kind: int) -> int:
    """Positions per scale of an i4 weight stored as tensor type `kind`; 0 for types that are not i4."""
    return BLOCK if VALUE_TYPES[kind] == "i4" else 0


def encode(weight: NDArray[np.float32], kind: int, grid: WeightGrid | None = None) -> NDArray[np.uint8]:
    """Weight [out, in] → bytes [out, row bytes] of a tensor of type `kind`, on `grid` if that fits the type.

    Raises `ValueError` for values that the type cannot hold.
    """
    rows, columns = weight.shape
    options = pack_options(VALUE_TYPES[kind], BLOCK)
    codes, meaning = quantize(weight, options if grid is None else grid.fitted(options, columns))
    if kind in (F16, F32):
        return np.ascontiguousarray(codes).view(np.uint8).reshape(rows, -1)
    blocks = columns // BLOCK
    if kind == Q8_0:
        scale = np.broadcast_to(meaning["scale"].astype("<f2").reshape(rows, 1, 1), (rows, blocks, 1))
        values = codes.astype(np.int8).view(np.uint8).reshape(rows, blocks, BLOCK)
    else:
        scale = meaning["scale"].astype("<f2").reshape(rows, blocks, 1)
        levels = (codes.astype(np.uint8) ^ np.uint8(8)).reshape(rows, blocks, 2, BLOCK // 2)
        values = levels[:, :, 0] | levels[:, :, 1] << np.uint8(4)
    result = np.concatenate([np.ascontiguousarray(scale).view(np.uint8), values], axis=2)
    return result.reshape(rows, -1)
