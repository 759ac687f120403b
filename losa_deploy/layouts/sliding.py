"""Sliding windows: 2 of every 4 positions without fixed groups, in tiles of 16 rows.

Slot j of a row holds one position of the window of 4 that starts at 2 j - 1, clipped to the row; positions
ascend from slot to slot. Every 2:4 mask is such a mask. The bytes are as many as those of 2:4 in tiles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.kept import kept_codes, packed_as, unpacked
from losa_deploy.layouts.steps import (
    STEP,
    TILE,
    Codes,
    by_row,
    is_whole,
    line_shapes,
    lines_are_canonical,
    load_lines,
    scale_shape,
    scales_by_row,
    scales_by_tile,
    sizes_of,
    store_lines,
    stores,
    to_tiles,
)
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

WINDOW, STRIDE = 4, 2
"""Positions of a window, and from one to the next."""
STEPS = TILE // STRIDE // 2
"""Steps per 16 columns."""


def find_slots(mask: NDArray[np.bool_]) -> NDArray[np.intp] | None:
    """The kept position of every slot [out, in / 2], ascending; None if the mask cannot be stored."""
    rows, columns = mask.shape
    if not is_whole(mask.shape):
        return None
    if not (np.count_nonzero(mask, axis=1) == columns // STRIDE).all():
        return None
    positions = np.nonzero(mask)[1].reshape(rows, -1)
    codes = positions - _starts(columns)
    return positions if ((codes >= 0) & (codes < WINDOW)).all() else None


def complete(mask: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The mask of sliding windows that keeps all that `mask` [out, in] does; None if there is none.

    For a mask that was found from zeros, and so lacks the kept weights that were rounded to zero. From left
    to right a slot takes the first kept position of its window that no slot before it took, and if there is
    none, the first that lies behind theirs. This finds a mask wherever there is one: windows end in the order
    of their slots, so that of the positions which a slot can take the first is the one that can wait least,
    and a slot without a kept position is in nobody's way. There is always a free position for it, because
    the window before it ends two earlier.
    """
    rows, columns = mask.shape
    if rows == 0 or columns == 0 or not is_whole(mask.shape):
        return None
    around = np.pad(mask, ((0, 0), (1, 1)))  # the windows at both ends reach beyond the row
    full, places = np.zeros(around.shape, np.bool_), np.arange(WINDOW)
    free = np.ones((rows, 1), np.intp)
    for start in range(0, columns, STRIDE):
        window = around[:, start : start + WINDOW] & (places >= free)
        if window[:, :STRIDE].all(axis=1).any():
            return None  # both leave the window, and one slot is left for them
        taken = np.where(window.any(axis=1), window.argmax(axis=1), free[:, 0])[:, None]
        np.put_along_axis(full, start + taken, True, axis=1)
        free = np.maximum(taken + 1 - STRIDE, 0)
    return None if (around[:, [columns]] & (free == 0)).any() else full[:, 1:-1]


def tolerates(mask: NDArray[np.bool_], options: PackOptions) -> bool:
    """Integers, whole tiles, and a kept position for every window."""
    return stores(VALUE_TYPES[options.value_type]) and find_slots(mask) is not None


def known(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> bool:
    """Integers, whole tiles, and no parameters."""
    return stores(kind) and is_whole(shape) and not any(params.values())


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of positions, values and scale."""
    lines = line_shapes(shape[0] // TILE, shape[1] // TILE * STEPS, kind)
    return {**lines, "scale": scale_shape(shape, kind, params.get("group_size", 0))}


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """Positions, values and scales as `docs/formats.md` says.

    Raises `ValueError` if the mask does not keep one position of every window, for values that are no
    integers, and for shapes that are no multiple of 16.
    """
    kind, positions = VALUE_TYPES[options.value_type], find_slots(mask)
    if positions is None or not stores(kind):
        raise ValueError("the sliding layout stores integers of which every window of 4 keeps one")
    codes, meaning = kept_codes(weight, mask, options)
    by_group = mask.shape[0], mask.shape[1] // TILE, -1
    places = (positions - _starts(mask.shape[1])).astype(np.uint8).reshape(by_group)
    values = np.take_along_axis(codes, positions, axis=1).reshape(by_group)
    arrays = {**store_lines(to_tiles(places), to_tiles(values), kind), **scales_by_tile(meaning, kind)}
    return packed_as("sliding", mask, options, arrays)


def unpack(packed: PackedTensor) -> Unpacked:
    """Put the slots where they belong."""
    kind, shape = VALUE_TYPES[packed.value_type], packed.shape
    places, values = _slots(packed)
    positions = _positions(places, shape)
    mask, codes = np.zeros(shape, np.bool_), np.zeros(shape, values.dtype)
    np.put_along_axis(mask, positions, True, axis=1)
    np.put_along_axis(codes, positions, by_row(values).reshape(shape[0], -1), axis=1)
    return unpacked(packed, codes, mask, scales_by_row(packed.arrays, kind))


def check(packed: PackedTensor) -> int:
    """Positions ascend in every row and lie inside of it, and free bits are zero."""
    places, values = _slots(packed)
    positions, (rows, columns) = _positions(places, packed.shape), packed.shape
    ascending = (np.diff(positions, axis=1, prepend=-1) > 0).all() and (positions[:, -1] < columns).all()
    canonical = lines_are_canonical(packed.arrays, places, values, VALUE_TYPES[packed.value_type])
    if not (ascending and canonical) or packed.nnz != rows * columns // STRIDE:
        raise ValueError("positions do not ascend in their row, or are not as many as it has windows")
    return packed.nnz


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes; raises `ValueError` if the mask cannot be stored."""
    if not tolerates(mask, options):
        raise ValueError("the mask does not keep one position of every window of 4")
    shape, kind = (mask.shape[0], mask.shape[1]), VALUE_TYPES[options.value_type]
    return sizes_of(shapes(shape, kind, {"group_size": options.group_size}), shape, kind, options)


def _starts(columns: int) -> NDArray[np.intp]:
    """First position of the window of every slot of a row."""
    return STRIDE * np.arange(columns // STRIDE, dtype=np.intp) - 1


def _slots(packed: PackedTensor) -> tuple[Codes, NDArray[np.generic]]:
    """Places within windows and values of all slots, each [tiles, in / 16, 4, 32]."""
    shape = (packed.shape[0] // TILE, packed.shape[1] // TILE, STEPS, STEP)
    return load_lines(packed.arrays, shape, VALUE_TYPES[packed.value_type])


def _positions(places: Codes, shape: tuple[int, int]) -> NDArray[np.intp]:
    """Places within windows → positions [out, in / 2]."""
    return by_row(places).reshape(shape[0], -1).astype(np.intp) + _starts(shape[1])


SLIDING = register(
    Layout(
        "sliding",
        4,
        ("Sliding",),
        pack,
        unpack,
        sizes,
        known,
        shapes,
        check,
        lambda packed: "Sliding",
        lambda packed: True,
        tolerates,
        stores,
        rows_together=TILE,
    )
)
