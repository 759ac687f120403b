"""Bitmask: one bit per position, and the kept values as a stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.dense import known
from losa_deploy.layouts.kept import kept_codes, packed_as, unpacked
from losa_deploy.layouts.streams import check_stream, load_stream, store_stream, stream_bytes
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

ROW_POSITIONS = 64
"""Rows are padded to a multiple of this many positions, so that each starts at an aligned 64-bit word."""


def row_bytes(in_features: int) -> int:
    """Mask bytes per row."""
    return -(-in_features // ROW_POSITIONS) * (ROW_POSITIONS // 8)


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """positions: uint8 [out, row bytes], lowest bit first; values: the stream of kept codes."""
    codes, meaning = kept_codes(weight, mask, options)
    values = store_stream(codes, mask, VALUE_TYPES[options.value_type])
    return packed_as("bitmask", mask, options, {"positions": _store_mask(mask), "values": values, **meaning})


def unpack(packed: PackedTensor) -> Unpacked:
    """Scatter the kept codes to the set bits; the rest holds zero."""
    mask = _load_mask(packed)
    return unpacked(packed, load_stream(packed.arrays["values"], mask, VALUE_TYPES[packed.value_type]), mask)


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes."""
    shape, kind = (mask.shape[0], mask.shape[1]), VALUE_TYPES[options.value_type]
    return {
        "positions": shape[0] * row_bytes(shape[1]),
        "values": stream_bytes(np.count_nonzero(mask, axis=1), kind),
        **kind.meaning_bytes(shape, options),
    }


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of positions, values and scale."""
    scale = kind.scale_shape(shape, params.get("group_size", 0))
    return {"positions": (shape[0], row_bytes(shape[1])), "values": None, "scale": scale}


def check(packed: PackedTensor) -> int:
    """Bits have to lie inside of their row, and values to be as many."""
    mask = _load_mask(packed)
    if not np.array_equal(_store_mask(mask), packed.arrays["positions"]):
        raise ValueError("positions lie outside of their row, or are not as many as their group has")
    check_stream(packed, np.count_nonzero(mask, axis=1))
    return int(np.count_nonzero(mask))


def unpadded(packed: PackedTensor) -> bool:
    """Rows end with a whole word."""
    return packed.shape[1] % ROW_POSITIONS == 0


def _store_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    positions = np.zeros((mask.shape[0], row_bytes(mask.shape[1])), np.uint8)
    bits = np.packbits(mask, axis=1, bitorder="little")
    positions[:, : bits.shape[1]] = bits
    return positions


def _load_mask(packed: PackedTensor) -> NDArray[np.bool_]:
    bits = packed.arrays["positions"].astype(np.uint8)
    return np.unpackbits(bits, axis=1, count=packed.shape[1], bitorder="little").astype(np.bool_)


def form(packed: PackedTensor) -> str:
    """There is one."""
    del packed
    return "Bitmask"


BITMASK = register(
    Layout("bitmask", 1, ("Bitmask",), pack, unpack, sizes, known, shapes, check, form, unpadded)
)
