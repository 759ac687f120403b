"""Dense: every position stored, no mask. The yardstick, and the layout of embedding and head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Unpacked, register
from losa_deploy.layouts.values import dequantize, load_rows, quantize, scale_bytes, store_rows, value_params


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """Values [out, in] (i4: [out, ceil(in / 2)], each row starts a byte)."""
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    return PackedTensor(
        "dense",
        options.value_type,
        (weight.shape[0], weight.shape[1]),
        value_params(options),
        {"values": store_rows(codes, options.value_type), **meaning},
        int(mask.sum()),
    )


def unpack(packed: PackedTensor) -> Unpacked:
    """The stored matrix; the mask is all True because none is stored."""
    codes = load_rows(packed.arrays["values"], packed.value_type, packed.shape[1])
    weight = dequantize(codes, packed.value_type, packed.params, packed.arrays)
    return Unpacked(weight, np.ones(packed.shape, np.bool_))


def dense_size(shape: tuple[int, int], options: PackOptions) -> int:
    """Stored bytes of a matrix of `shape` (out, in)."""
    bits = {"f32": 32, "f16": 16, "i8": 8, "i4": 4}[options.value_type]
    return shape[0] * (-(-shape[1] * bits // 8)) + scale_bytes(shape, options)


def size(mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Stored bytes; independent of what the mask keeps."""
    return dense_size((mask.shape[0], mask.shape[1]), options)


DENSE = register(Layout("dense", pack, unpack, size))
