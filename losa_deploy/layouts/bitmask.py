"""Bitmask: one bit per position, and the kept values row after row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Unpacked, register
from losa_deploy.layouts.values import (
    ZERO_CODE,
    code_dtype,
    dequantize,
    load,
    quantize,
    scale_bytes,
    store,
    value_bytes,
    value_params,
)

ROW_POSITIONS = 64
"""Rows are padded to a multiple of this many positions, so that each starts at an aligned 64-bit word."""


def row_bytes(in_features: int) -> int:
    """Mask bytes per row."""
    return -(-in_features // ROW_POSITIONS) * (ROW_POSITIONS // 8)


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """positions: uint8 [out, row bytes], lowest bit first; values: kept codes, row-major."""
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
        {"positions": positions, "values": store(codes[mask], options.value_type), **meaning},
        int(mask.sum()),
    )


def unpack(packed: PackedTensor) -> Unpacked:
    """Scatter the kept codes to the set bits; the rest holds the zero code."""
    bits = packed.arrays["positions"].astype(np.uint8)
    mask = np.unpackbits(bits, axis=1, count=packed.shape[1], bitorder="little").astype(np.bool_)
    codes = np.full(packed.shape, ZERO_CODE[packed.value_type], code_dtype(packed.value_type))
    codes[mask] = load(packed.arrays["values"], packed.value_type, packed.nnz)
    weight = dequantize(codes, packed.value_type, packed.params, packed.arrays)
    return Unpacked(np.where(mask, weight, np.float32(0)), mask)


def size(mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Stored bytes."""
    shape = (mask.shape[0], mask.shape[1])
    kept = value_bytes(int(mask.sum()), options.value_type)
    total: int = shape[0] * row_bytes(shape[1]) + kept + scale_bytes(shape, options)
    return total


BITMASK = register(Layout("bitmask", pack, unpack, size))
