"""N of every M positions, 16 rows side by side: what a kernel without an expand instruction reads fastest.

A kept weight has a slot of its own: its level, and its position within the group of M. A byte shuffle then
fetches the activations of 32 slots at once, so that no mask is counted and nothing pruned is computed.
Groups are of 4 (1:4 and 2:4, positions of 2 bits) or of 16 (positions of 4 bits, which takes more bytes
than a mask where more than 4 of 16 are kept).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.kept import kept_codes, packed_as, unpacked
from losa_deploy.layouts.nm import fits
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

WIDE, SHORT = 16, 4
"""Positions of a group: as many as a byte shuffle reaches, or four."""


def find_pattern(mask: NDArray[np.bool_]) -> tuple[int, int] | None:
    """(N, M) if the mask can be stored, else None: 1:4 and 2:4 as such, any other as N of 16."""
    if not is_whole(mask.shape) or mask.all():
        return None
    for m, most in ((SHORT, 2), (WIDE, WIDE - 1)):
        n = int(np.count_nonzero(mask[0, :m]))
        if 1 <= n <= most and fits(mask, n, m):
            return n, m
    return None


def known_pattern(n: int, m: int) -> bool:
    """Whether a tensor of the format can keep N of every M."""
    return (m == WIDE and 1 <= n < m) or (m == SHORT and n in (1, 2))


def steps(n: int, m: int) -> int:
    """Steps per 16 positions: an odd N of 16 has a free slot."""
    return -(-n // 2) if m == WIDE else 2 * n


def holds(kind: ValueType, m: int) -> bool:
    """Groups of 16 have a byte per slot, or half a byte beside one: narrower codes would save nothing."""
    return stores(kind) and (m == SHORT or kind.bits in (4, 8))


def saves(kind: ValueType, n: int) -> bool:
    """Whether N:16 takes fewer bytes than dense: a slot has a position of 4 bits beside its code."""
    return 2 * steps(n, WIDE) * (kind.bits + 4) < WIDE * kind.bits


def known(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> bool:
    """Patterns of the format, integers, whole tiles."""
    whole = is_whole(shape) and not params["position_bits"]
    return whole and known_pattern(params["n"], params["m"]) and holds(kind, params["m"])


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of positions, values and scale; of tiles, group scales lie together."""
    tiles, groups, deep = shape[0] // TILE, shape[1] // TILE, steps(params["n"], params["m"])
    scale = scale_shape(shape, kind, params.get("group_size", 0))
    if params["m"] == SHORT:
        return {**line_shapes(tiles, groups * deep, kind), "scale": scale}
    positions = {} if _joined(kind) else {"positions": (tiles, groups, deep, STEP // 2)}
    return {**positions, "values": (tiles, groups, deep, STEP), "scale": scale}


def _joined(kind: ValueType) -> bool:
    """Whether a code and a position of 4 bits share a byte."""
    return kind.bits == 4


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """Positions, values and scales as `docs/formats.md` says, of the pattern that `find_pattern` finds.

    Raises `ValueError` if the mask does not keep N of every M, for other value types, and for shapes that
    are no multiple of 16.
    """
    if not tolerates(mask, options):
        raise ValueError("the tiled layout stores integers that keep 1:4, 2:4 or N of every 16")
    (n, m), kind = _pattern(mask, options), VALUE_TYPES[options.value_type]
    codes, meaning = kept_codes(weight, mask, options)
    rows, groups = mask.shape[0], mask.shape[1] // TILE
    grouped = mask.reshape(rows, -1, m)
    # Kept positions first, in ascending order.
    order = np.argsort(~grouped, axis=2, kind="stable")[:, :, :n]
    positions = to_tiles(order.astype(np.uint8).reshape(rows, groups, -1))
    of_slots = np.take_along_axis(codes.reshape(grouped.shape), order, axis=2)
    store = store_lines if m == SHORT else _store_wide
    values = to_tiles(of_slots.reshape(rows, groups, -1))
    arrays = {**store(positions, values, kind), **scales_by_tile(meaning, kind)}
    return packed_as("tiled", mask, options, arrays, n=n, m=m)


def unpack(packed: PackedTensor) -> Unpacked:
    """Put the slots where they belong."""
    m, shape = packed.params["m"], packed.shape
    positions, values = slots(packed)
    order = _by_group(positions, packed).astype(np.intp)
    mask = np.zeros((shape[0], shape[1] // m, m), np.bool_)
    np.put_along_axis(mask, order, True, axis=2)
    codes = np.zeros(mask.shape, values.dtype)
    np.put_along_axis(codes, order, _by_group(values, packed), axis=2)
    meaning = scales_by_row(packed.arrays, VALUE_TYPES[packed.value_type])
    return unpacked(packed, codes.reshape(shape), mask.reshape(shape), meaning)


def slots(packed: PackedTensor) -> tuple[Codes, NDArray[np.generic]]:
    """Positions and values of all slots, each [tiles, in / 16, steps, 32]."""
    n, m = packed.params["n"], packed.params["m"]
    load = load_lines if m == SHORT else _load_wide
    shape = (packed.shape[0] // TILE, packed.shape[1] // TILE, steps(n, m), STEP)
    return load(packed.arrays, shape, VALUE_TYPES[packed.value_type])


def kept(packed: PackedTensor) -> int:
    """Kept weights."""
    return packed.shape[0] * (packed.shape[1] // packed.params["m"]) * packed.params["n"]


def sound(packed: PackedTensor) -> bool:
    """Whether positions ascend in their group, and free slots and free bits are zero."""
    n, m = packed.params["n"], packed.params["m"]
    positions, values = slots(packed)
    ascending = _by_group(positions, packed).astype(np.int16)
    if (np.diff(ascending, axis=2) <= 0).any():
        return False
    if m == WIDE:
        return not (n % 2 and (_free(positions).any() or _free(values).any()))
    return lines_are_canonical(packed.arrays, positions, values, VALUE_TYPES[packed.value_type])


def check(packed: PackedTensor) -> int:
    """Positions ascend in their group, and as many are kept as there are slots."""
    if not sound(packed) or packed.nnz != kept(packed):
        raise ValueError("positions do not ascend in their group, or are not as many as it has")
    return packed.nnz


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes; raises `ValueError` if the mask cannot be stored."""
    shape, kind = (mask.shape[0], mask.shape[1]), VALUE_TYPES[options.value_type]
    n, m = _pattern(mask, options)
    found = shapes(shape, kind, {"n": n, "m": m, "group_size": options.group_size})
    return sizes_of(found, shape, kind, options)


def tolerates(mask: NDArray[np.bool_], options: PackOptions) -> bool:
    """Integer values, shapes in multiples of 16, a pattern that can be stored."""
    found = find_pattern(mask)
    return (
        found is not None
        and holds(VALUE_TYPES[options.value_type], found[1])
        and options.pattern in (None, found)
    )


def _pattern(mask: NDArray[np.bool_], options: PackOptions) -> tuple[int, int]:
    pattern = options.pattern or find_pattern(mask)
    if pattern is None:
        raise ValueError("the mask does not keep 1:4, 2:4 or N of every 16 positions")
    return pattern


def _store_wide(positions: Codes, values: Codes, kind: ValueType) -> dict[str, Component]:
    """Position and code in a byte, or positions in nibbles beside values of 8 bits."""
    if _joined(kind):
        return {"values": values << np.uint8(4) | positions}
    low, high = positions[..., : STEP // 2], positions[..., STEP // 2 :]
    return {"positions": high << np.uint8(4) | low, "values": values}


def _load_wide(
    arrays: Mapping[str, Component], shape: tuple[int, ...], kind: ValueType
) -> tuple[Codes, NDArray[np.generic]]:
    """Inverse of `_store_wide`; positions and values of `shape`."""
    if _joined(kind):
        both = arrays["values"].astype(np.uint8)
        return both & np.uint8(15), both >> np.uint8(4)
    nibbles = arrays["positions"].astype(np.uint8)
    return np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=3), arrays["values"]


def _by_group(tiles: NDArray[np.generic], packed: PackedTensor) -> NDArray[np.generic]:
    """Inverse of `to_tiles`, without free slots: [out, in / M, N]."""
    n, m = packed.params["n"], packed.params["m"]
    return by_row(tiles)[:, :, : n * WIDE // m].reshape(packed.shape[0], -1, n)


def _free(tiles: NDArray[np.generic]) -> NDArray[np.generic]:
    """The second slots of the last step of every group of 16."""
    return tiles[:, :, -1, 1::2]


def form(packed: PackedTensor) -> str:
    """Groups of 16, or of 4."""
    return "TiledQuads" if packed.params["m"] == SHORT else "Tiled"


TILED = register(
    Layout(
        "tiled",
        3,
        ("Tiled", "TiledQuads"),
        pack,
        unpack,
        sizes,
        known,
        shapes,
        check,
        form,
        lambda packed: True,
        tolerates,
        stores,
        ("n", "m"),
        rows_together=TILE,
    )
)
