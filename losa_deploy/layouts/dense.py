"""Dense: every position stored, no mask. The yardstick, and the layout of embedding and head."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.kept import kept_codes, packed_as
from losa_deploy.layouts.rows import BLOCK, load_rows, row_bytes, store_rows
from losa_deploy.layouts.values import VALUE_TYPES, ValueType, dequantize


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """Values [out, in], or [out, row bytes] below 8 bits."""
    codes, meaning = kept_codes(weight, mask, options)
    values = store_rows(codes, VALUE_TYPES[options.value_type])
    return packed_as("dense", mask, options, {"values": values, **meaning})


def unpack(packed: PackedTensor) -> Unpacked:
    """The stored matrix; the mask is all True because none is stored."""
    codes = load_rows(packed.arrays["values"], VALUE_TYPES[packed.value_type], packed.shape[1])
    weight = dequantize(codes, packed.value_type, packed.params, packed.arrays)
    return Unpacked(weight, np.ones(packed.shape, np.bool_))


def dense_size(shape: tuple[int, int], options: PackOptions) -> int:
    """Stored bytes of a matrix of `shape` (out, in)."""
    kind = VALUE_TYPES[options.value_type]
    return shape[0] * row_bytes(shape[1], kind) + sum(kind.meaning_bytes(shape, options).values())


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes; independent of what the mask keeps."""
    shape, kind = (mask.shape[0], mask.shape[1]), VALUE_TYPES[options.value_type]
    return {"values": shape[0] * row_bytes(shape[1], kind), **kind.meaning_bytes(shape, options)}


def known(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> bool:
    """No positions, so nothing that describes them."""
    del shape, kind
    return not any(params[name] for name in ("n", "m", "position_bits"))


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of values and scale."""
    width = row_bytes(shape[1], kind) // kind.stored.itemsize
    return {"values": (shape[0], width), "scale": kind.scale_shape(shape, params.get("group_size", 0))}


def check(packed: PackedTensor) -> int:
    """All positions hold a value; how many are kept is information only."""
    return packed.nnz


def unpadded(packed: PackedTensor) -> bool:
    """Rows below 8 bits decode in whole blocks."""
    return VALUE_TYPES[packed.value_type].bits >= 8 or packed.shape[1] % BLOCK == 0


DENSE = register(
    Layout("dense", 0, ("Dense",), pack, unpack, sizes, known, shapes, check, lambda _: "Dense", unpadded)
)
