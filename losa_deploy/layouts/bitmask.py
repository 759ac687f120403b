"""Bitmask: one bit per position, and the kept values as a stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Unpacked, register
from losa_deploy.layouts.streams import load_stream, store_stream, stream_bytes
from losa_deploy.layouts.values import dequantize, quantize, scale_bytes, value_params

ROW_POSITIONS = 64
"""Rows are padded to a multiple of this many positions, so that each starts at an aligned 64-bit word."""


def row_bytes(in_features: int) -> int:
    """Mask bytes per row."""
    return -(-in_features // ROW_POSITIONS) * (ROW_POSITIONS // 8)


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """positions: uint8 [out, row bytes], lowest bit first; values: the stream of kept codes."""
    out_features, in_features = weight.shape
    positions = np.zeros((out_features, row_bytes(in_features)), np.uint8)
    bits = np.packbits(mask, axis=1, bitorder="little")
    positions[:, : bits.shape[1]] = bits
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    return PackedTensor(
        "bitmask",
        options.value_type,
        (out_features, in_features),
        value_params(options),
        {"positions": positions, "values": store_stream(codes, mask, options.value_type), **meaning},
        int(mask.sum()),
    )


def unpack(packed: PackedTensor) -> Unpacked:
    """Scatter the kept codes to the set bits; the rest holds zero."""
    bits = packed.arrays["positions"].astype(np.uint8)
    mask = np.unpackbits(bits, axis=1, count=packed.shape[1], bitorder="little").astype(np.bool_)
    codes = load_stream(packed.arrays["values"], mask, packed.value_type)
    weight = dequantize(codes, packed.value_type, packed.params, packed.arrays)
    return Unpacked(np.where(mask, weight, np.float32(0)), mask)


def size(mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Stored bytes."""
    shape = (mask.shape[0], mask.shape[1])
    kept = stream_bytes(np.count_nonzero(mask, axis=1), options.value_type)
    total: int = shape[0] * row_bytes(shape[1]) + kept + scale_bytes(shape, options)
    return total


BITMASK = register(Layout("bitmask", pack, unpack, size))
