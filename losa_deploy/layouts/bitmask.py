"""Bitmask: one bit per position, and the kept values as a stream.

Where the rows 2 i and 2 i + 1 have the same mask, it can be stored once for both (`rows_per_mask` 2), in
value types that have scales. A last row without a partner has a mask of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.kept import kept_codes, packed_as, unpacked
from losa_deploy.layouts.streams import check_stream, load_stream, store_stream, stream_bytes
from losa_deploy.layouts.values import VALUE_TYPES, ValueType
from losa_deploy.layouts.values.base import NO_SCALE

ROW_POSITIONS = 64
"""Rows are padded to a multiple of this many positions, so that each starts at an aligned 64-bit word."""


PAIR = 2
"""Rows that may share a mask."""


def row_bytes(in_features: int) -> int:
    """Bytes of a mask of one row."""
    return -(-in_features // ROW_POSITIONS) * (ROW_POSITIONS // 8)


def can_share(kind: ValueType) -> bool:
    """Whether rows of this type can share masks: how many rows there are, the scales say then."""
    return NO_SCALE not in kind.scale_types


def paired(mask: NDArray[np.bool_]) -> bool:
    """Whether all rows 2 i and 2 i + 1 of a mask [out, in] are equal, and there are two or more."""
    odd = mask[1::2]
    return len(odd) > 0 and np.array_equal(mask[: 2 * len(odd) : 2], odd)


def share(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask [out, in] in which the rows 2 i and 2 i + 1 both keep what either of them keeps."""
    either = mask[::2].copy()
    either[: len(mask) // PAIR] |= mask[1::2]
    return np.repeat(either, PAIR, axis=0)[: len(mask)]


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """positions: uint8 [masks, row bytes], lowest bit first; values: the stream of kept codes.

    Raises `ValueError` if rows are to share masks, but differ or cannot in this type.
    """
    kind, shared = VALUE_TYPES[options.value_type], options.rows_per_mask
    if shared != 1 and not (shared == PAIR and can_share(kind) and paired(mask)):
        raise ValueError(f"rows of {kind.name} with this mask do not share masks in groups of {shared}")
    codes, meaning = kept_codes(weight, mask, options)
    values = store_stream(codes, mask, kind, paired=shared == PAIR)
    arrays = {"positions": _store_mask(mask[::shared]), "values": values, **meaning}
    params = {"rows_per_mask": shared} if shared == PAIR else {}
    return packed_as("bitmask", mask, options, arrays, **params)


def unpack(packed: PackedTensor) -> Unpacked:
    """Scatter the kept codes to the set bits; the rest holds zero."""
    mask, kind = _load_mask(packed), VALUE_TYPES[packed.value_type]
    codes = load_stream(packed.arrays["values"], mask, kind, paired=_shared(packed.params) == PAIR)
    return unpacked(packed, codes, mask)


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes."""
    shape, kind = (mask.shape[0], mask.shape[1]), VALUE_TYPES[options.value_type]
    counts, shared = np.count_nonzero(mask, axis=1), options.rows_per_mask
    return {
        "positions": -(-shape[0] // shared) * row_bytes(shape[1]),
        "values": stream_bytes(counts, kind, paired=shared == PAIR),
        **kind.meaning_bytes(shape, options),
    }


def known(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> bool:
    """Rows per mask, in the place of n: 0 for a mask of each row, or 2."""
    del shape
    shared = params["n"] == 0 or (params["n"] == PAIR and can_share(kind))
    return shared and not params["m"] and not params["position_bits"]


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of positions, values and scale."""
    scale = kind.scale_shape(shape, params.get("group_size", 0))
    masks = -(-shape[0] // _shared(params))
    return {"positions": (masks, row_bytes(shape[1])), "values": None, "scale": scale}


def check(packed: PackedTensor) -> int:
    """Bits have to lie inside of their row, and values to be as many."""
    mask, shared = _load_mask(packed), _shared(packed.params)
    if not np.array_equal(_store_mask(mask[::shared]), packed.arrays["positions"]):
        raise ValueError("positions lie outside of their row, or are not as many as their group has")
    check_stream(packed, np.count_nonzero(mask, axis=1), paired=shared == PAIR)
    return int(np.count_nonzero(mask))


def _shared(params: Mapping[str, int]) -> int:
    """Rows per mask."""
    return params.get("rows_per_mask", 1)


def unpadded(packed: PackedTensor) -> bool:
    """Rows end with a whole word."""
    return packed.shape[1] % ROW_POSITIONS == 0


def _store_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    positions = np.zeros((mask.shape[0], row_bytes(mask.shape[1])), np.uint8)
    bits = np.packbits(mask, axis=1, bitorder="little")
    positions[:, : bits.shape[1]] = bits
    return positions


def _load_mask(packed: PackedTensor) -> NDArray[np.bool_]:
    """[out, in]."""
    bits = packed.arrays["positions"].astype(np.uint8)
    masks = np.unpackbits(bits, axis=1, count=packed.shape[1], bitorder="little").astype(np.bool_)
    return np.repeat(masks, _shared(packed.params), axis=0)[: packed.shape[0]]


def form(packed: PackedTensor) -> str:
    """A mask for each row, or for pairs of rows."""
    return "BitmaskPairs" if _shared(packed.params) == PAIR else "Bitmask"


BITMASK = register(
    Layout(
        "bitmask",
        1,
        ("Bitmask", "BitmaskPairs"),
        pack,
        unpack,
        sizes,
        known,
        shapes,
        check,
        form,
        unpadded,
        parameters=("rows_per_mask",),
    )
)
