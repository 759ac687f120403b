"""N of every 16 positions, 16 rows side by side: what a kernel without an expand instruction reads fastest.

A kept weight has a slot of its own: its level, and its position within the group in 4 bits. A byte
shuffle then fetches the activations of 32 slots at once, so that no mask is counted and nothing pruned is
computed. It takes more bytes than a mask where more than 4 of 16 are kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, Layout, PackedTensor, PackOptions, Unpacked, register
from losa_deploy.layouts.nm import fits
from losa_deploy.layouts.values import dequantize, group_count, quantize, scale_bytes, value_params

M = 16
"""Positions of a group, as many as a byte shuffle reaches, and rows of a tile."""
STEP = 2 * M
"""Slots of a step: two of each row of a tile."""
Codes = NDArray[np.uint8]


def find_pattern(mask: NDArray[np.bool_]) -> tuple[int, int] | None:
    """(N, 16) if the mask can be stored, else None."""
    rows, columns = mask.shape
    if rows == 0 or columns == 0 or rows % M or columns % M or mask.all():
        return None
    n = int(np.count_nonzero(mask[0, :M]))
    return (n, M) if n and fits(mask, n, M) else None


def steps(n: int) -> int:
    """Steps per group: an odd N has a free slot."""
    return -(-n // 2)


def shapes(shape: tuple[int, int], n: int, options: PackOptions) -> dict[str, tuple[int, ...]]:
    """Component → shape, without table."""
    tiles, groups = shape[0] // M, shape[1] // M
    if options.value_type == "i4":
        scales = group_count(shape[1], options.group_size)
        return {"values": (tiles, groups, steps(n), STEP), "scale": (tiles, scales, M)}
    positions = (tiles, groups, steps(n), STEP // 2)
    return {"positions": positions, "values": (tiles, groups, steps(n), STEP), "scale": (shape[0],)}


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """i4: values, a byte per slot, its position below its code; i8: positions in nibbles, and values.

    Raises `ValueError` if the mask does not keep N of every 16, for other value types, and for shapes that
    are no multiple of 16.
    """
    pattern = options.pattern or find_pattern(mask)
    if pattern is None or not tolerates(mask, PackOptions(options.value_type, pattern=pattern)):
        raise ValueError("the tiled layout stores i8 or i4 weights that keep N of every 16 positions")
    n = pattern[0]
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    grouped = mask.reshape(mask.shape[0], -1, M)
    # Kept positions first, in ascending order.
    order = np.argsort(~grouped, axis=2, kind="stable")[:, :, :n]
    positions = _tile(order.astype(np.uint8))
    values = _tile(np.take_along_axis(codes.reshape(grouped.shape), order, axis=2))
    arrays: dict[str, Component]
    if options.value_type == "i4":
        tiles, scales = mask.shape[0] // M, meaning["scale"].shape[1]
        by_tile = meaning["scale"].reshape(tiles, M, scales).transpose(0, 2, 1)
        arrays = {"values": values << np.uint8(4) | positions, "scale": np.ascontiguousarray(by_tile)}
        arrays["table"] = meaning["table"]
    else:
        low, high = positions[..., : STEP // 2], positions[..., STEP // 2 :]
        arrays = {"positions": high << np.uint8(4) | low, "values": values, **meaning}
    shape = (mask.shape[0], mask.shape[1])
    params = {"n": n, "m": M, **value_params(options)}
    return PackedTensor("tiled", options.value_type, shape, params, arrays, int(mask.sum()))


def unpack(packed: PackedTensor) -> Unpacked:
    """Put the slots where they belong."""
    n, shape = packed.params["n"], packed.shape
    positions, values = slots(packed)
    order = _rows(positions, n).astype(np.intp)
    mask = np.zeros((shape[0], shape[1] // M, M), np.bool_)
    np.put_along_axis(mask, order, True, axis=2)
    codes = np.zeros(mask.shape, values.dtype)
    np.put_along_axis(codes, order, _rows(values, n), axis=2)
    arrays = dict(packed.arrays)
    if packed.value_type == "i4":
        arrays["scale"] = arrays["scale"].transpose(0, 2, 1).reshape(shape[0], -1)
    weight = dequantize(codes.reshape(shape), packed.value_type, packed.params, arrays)
    mask = mask.reshape(shape)
    return Unpacked(np.where(mask, weight, np.float32(0)), mask)


def slots(packed: PackedTensor) -> tuple[Codes, NDArray[np.generic]]:
    """Positions and values of all slots, each [tiles, groups, steps, 32]."""
    values = packed.arrays["values"]
    if packed.value_type == "i4":
        both = values.astype(np.uint8)
        return both & np.uint8(15), both >> np.uint8(4)
    nibbles = packed.arrays["positions"].astype(np.uint8)
    return np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=3), values


def kept(packed: PackedTensor) -> int:
    """Kept weights."""
    return packed.shape[0] * (packed.shape[1] // M) * packed.params["n"]


def sound(packed: PackedTensor) -> bool:
    """Whether positions ascend in their group and the free slots of an odd N are zero."""
    n = packed.params["n"]
    positions, values = slots(packed)
    ascending = _rows(positions, n).astype(np.int16)
    free = n % 2 and (_free(positions).any() or _free(values).any())
    return bool((np.diff(ascending, axis=2) > 0).all() and not free)


def size(mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Stored bytes; raises `ValueError` if the mask cannot be stored."""
    pattern = options.pattern or find_pattern(mask)
    if pattern is None:
        raise ValueError("the mask does not keep N of every 16 positions")
    per_step = STEP if options.value_type == "i4" else STEP + STEP // 2
    rows, columns = mask.shape
    total: int = rows // M * (columns // M) * steps(pattern[0]) * per_step
    return total + scale_bytes((rows, columns), options)


def tolerates(mask: NDArray[np.bool_], options: PackOptions) -> bool:
    """Integer values, shapes in multiples of 16, N of every 16 kept."""
    found = find_pattern(mask)
    return found is not None and options.value_type in ("i8", "i4") and options.pattern in (None, found)


def _tile(slots: NDArray[np.generic]) -> Codes:
    """[out, groups, N] → [tiles, groups, steps, 32]: byte 4 i + 2 h + k is slot k of row 8 h + i."""
    rows, groups, n = slots.shape
    even = np.zeros((rows, groups, 2 * steps(n)), slots.dtype)
    even[:, :, :n] = slots
    split = even.reshape(rows // M, 2, M // 2, groups, steps(n), 2)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 2, 1, 5)).reshape(rows // M, groups, steps(n), STEP)


def _rows(tiles: NDArray[np.generic], n: int) -> NDArray[np.generic]:
    """Inverse of `_tile`."""
    count, groups, depth = tiles.shape[:3]
    split = tiles.reshape(count, groups, depth, M // 2, 2, 2).transpose(0, 4, 3, 1, 2, 5)
    return split.reshape(count * M, groups, 2 * depth)[:, :, :n]


def _free(tiles: NDArray[np.generic]) -> NDArray[np.generic]:
    """The second slots of the last step of every group."""
    return tiles[:, :, -1, 1::2]


TILED = register(Layout("tiled", pack, unpack, size, tolerates))
