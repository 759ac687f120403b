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

from losa_deploy.layouts.base import Component, Layout, PackedTensor, PackOptions, Unpacked, register
from losa_deploy.layouts.nm import fits
from losa_deploy.layouts.values import dequantize, group_count, quantize, scale_bytes, value_params

TILE = 16
"""Rows of a tile; its columns are a multiple of it too."""
WIDE, SHORT = 16, 4
"""Positions of a group: as many as a byte shuffle reaches, or four."""
STEP = 2 * TILE
"""Slots of a step: two of each row of a tile."""
PER_LINE = 4
"""Steps whose positions of 2 bits share 32 bytes."""
Codes = NDArray[np.uint8]


def find_pattern(mask: NDArray[np.bool_]) -> tuple[int, int] | None:
    """(N, M) if the mask can be stored, else None: 1:4 and 2:4 as such, any other as N of 16."""
    rows, columns = mask.shape
    if rows == 0 or columns == 0 or rows % TILE or columns % TILE or mask.all():
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


def shapes(
    shape: tuple[int, int], pattern: tuple[int, int], options: PackOptions
) -> dict[str, tuple[int, ...]]:
    """Component → shape, without table."""
    tiles, groups, i4 = shape[0] // TILE, shape[1] // TILE, options.value_type == "i4"
    scale = (tiles, group_count(shape[1], options.group_size), TILE) if i4 else (shape[0],)
    deep = steps(*pattern)
    if pattern[1] == SHORT:
        lines = -(-groups * deep // PER_LINE)
        codes = groups * deep // (2 if i4 else 1)
        return {"positions": (tiles, lines, STEP), "values": (tiles, codes, STEP), "scale": scale}
    positions = {} if i4 else {"positions": (tiles, groups, deep, STEP // 2)}
    return {**positions, "values": (tiles, groups, deep, STEP), "scale": scale}


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """Positions, values and scales as `docs/formats.md` says, of the pattern that `find_pattern` finds.

    Raises `ValueError` if the mask does not keep N of every M, for other value types, and for shapes that
    are no multiple of 16.
    """
    if not tolerates(mask, options):
        raise ValueError("the tiled layout stores i8 or i4 weights that keep 1:4, 2:4 or N of every 16")
    (n, m), i4 = _pattern(mask, options), options.value_type == "i4"
    codes, meaning = quantize(np.where(mask, weight, np.float32(0)), options)
    rows, groups = mask.shape[0], mask.shape[1] // TILE
    grouped = mask.reshape(rows, -1, m)
    # Kept positions first, in ascending order.
    order = np.argsort(~grouped, axis=2, kind="stable")[:, :, :n]
    positions = _tile(order.astype(np.uint8).reshape(rows, groups, -1))
    kept_codes = np.take_along_axis(codes.reshape(grouped.shape), order, axis=2)
    store = _store_short if m == SHORT else _store_wide
    arrays = {**store(positions, _tile(kept_codes.reshape(rows, groups, -1)), i4), **meaning}
    if i4:
        by_tile = meaning["scale"].reshape(rows // TILE, TILE, -1).transpose(0, 2, 1)
        arrays["scale"] = np.ascontiguousarray(by_tile)
    params = {"n": n, "m": m, **value_params(options)}
    return PackedTensor("tiled", options.value_type, (rows, mask.shape[1]), params, arrays, int(mask.sum()))


def unpack(packed: PackedTensor) -> Unpacked:
    """Put the slots where they belong."""
    m, shape = packed.params["m"], packed.shape
    positions, values = slots(packed)
    order = _by_group(positions, packed).astype(np.intp)
    mask = np.zeros((shape[0], shape[1] // m, m), np.bool_)
    np.put_along_axis(mask, order, True, axis=2)
    codes = np.zeros(mask.shape, values.dtype)
    np.put_along_axis(codes, order, _by_group(values, packed), axis=2)
    arrays = dict(packed.arrays)
    if packed.value_type == "i4":
        arrays["scale"] = arrays["scale"].transpose(0, 2, 1).reshape(shape[0], -1)
    weight = dequantize(codes.reshape(shape), packed.value_type, packed.params, arrays)
    mask = mask.reshape(shape)
    return Unpacked(np.where(mask, weight, np.float32(0)), mask)


def slots(packed: PackedTensor) -> tuple[Codes, NDArray[np.generic]]:
    """Positions and values of all slots, each [tiles, in / 16, steps, 32]."""
    n, m = packed.params["n"], packed.params["m"]
    load = _load_short if m == SHORT else _load_wide
    shape = (packed.shape[0] // TILE, packed.shape[1] // TILE, steps(n, m), STEP)
    return load(packed.arrays, shape, packed.value_type == "i4")


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
    used = packed.shape[1] // TILE * steps(n, m) % PER_LINE
    last = packed.arrays["positions"][:, -1].astype(np.uint8)
    return not (used and (last >> np.uint8(2 * used)).any())


def size(mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Stored bytes; raises `ValueError` if the mask cannot be stored."""
    rows, columns = mask.shape
    found = shapes((rows, columns), _pattern(mask, options), options)
    stored = sum(int(np.prod(found[name])) for name in ("positions", "values") if name in found)
    return stored + scale_bytes((rows, columns), options)


def tolerates(mask: NDArray[np.bool_], options: PackOptions) -> bool:
    """Integer values, shapes in multiples of 16, a pattern that can be stored."""
    found = find_pattern(mask)
    return found is not None and options.value_type in ("i8", "i4") and options.pattern in (None, found)


def _pattern(mask: NDArray[np.bool_], options: PackOptions) -> tuple[int, int]:
    pattern = options.pattern or find_pattern(mask)
    if pattern is None:
        raise ValueError("the mask does not keep 1:4, 2:4 or N of every 16 positions")
    return pattern


def _store_wide(positions: Codes, values: Codes, i4: bool) -> dict[str, Component]:
    """Position and code in a byte, or positions in nibbles beside values of 8 bits."""
    if i4:
        return {"values": values << np.uint8(4) | positions}
    low, high = positions[..., : STEP // 2], positions[..., STEP // 2 :]
    return {"positions": high << np.uint8(4) | low, "values": values}


def _load_wide(
    arrays: Mapping[str, Component], shape: tuple[int, ...], i4: bool
) -> tuple[Codes, NDArray[np.generic]]:
    """Inverse of `_store_wide`; positions and values of `shape`."""
    if i4:
        both = arrays["values"].astype(np.uint8)
        return both & np.uint8(15), both >> np.uint8(4)
    nibbles = arrays["positions"].astype(np.uint8)
    return np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=3), arrays["values"]


def _store_short(positions: Codes, values: Codes, i4: bool) -> dict[str, Component]:
    """Steps of a tile in one sequence: positions of four in a line of 32 bytes, i4 codes of two."""
    by_step = positions.reshape(positions.shape[0], -1, STEP)
    lines = -(-by_step.shape[1] // PER_LINE)
    by_line = np.zeros((by_step.shape[0], lines * PER_LINE, STEP), np.uint8)
    by_line[:, : by_step.shape[1]] = by_step
    values = values.reshape(by_step.shape)
    return {
        "positions": _join(by_line, PER_LINE, 2),
        "values": _join(values, 2, 4) if i4 else values,
    }


def _load_short(
    arrays: Mapping[str, Component], shape: tuple[int, ...], i4: bool
) -> tuple[Codes, NDArray[np.generic]]:
    """Inverse of `_store_short`; positions and values of `shape`."""
    count = shape[1] * shape[2]
    positions = _split(arrays["positions"], PER_LINE, 2)[:, :count]
    values = _split(arrays["values"], 2, 4) if i4 else arrays["values"]
    return positions.reshape(shape), values.reshape(shape)


def _join(steps: Codes, count: int, bits: int) -> Codes:
    """[tiles, steps, 32] of few bits → [tiles, steps / count, 32], the first step in the lowest bits."""
    split = steps.reshape(steps.shape[0], -1, count, STEP)
    shifts = bits * np.arange(count, dtype=np.uint8)[:, None]
    joined: Codes = np.bitwise_or.reduce(split << shifts, axis=2)
    return joined


def _split(lines: Component, count: int, bits: int) -> Codes:
    """Inverse of `_join`."""
    shifts = bits * np.arange(count, dtype=np.uint8)[:, None]
    steps: Codes = lines.astype(np.uint8)[:, :, None, :] >> shifts & np.uint8(2**bits - 1)
    return steps.reshape(lines.shape[0], -1, STEP)


def _tile(slots: NDArray[np.generic]) -> Codes:
    """[out, in / 16, slots] → [tiles, in / 16, steps, 32]: byte 4 i + 2 h + k is slot k of row 8 h + i."""
    rows, groups, count = slots.shape
    deep = -(-count // 2)
    even = np.zeros((rows, groups, 2 * deep), slots.dtype)
    even[:, :, :count] = slots
    split = even.reshape(rows // TILE, 2, TILE // 2, groups, deep, 2)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 2, 1, 5)).reshape(rows // TILE, groups, deep, STEP)


def _by_group(tiles: NDArray[np.generic], packed: PackedTensor) -> NDArray[np.generic]:
    """Inverse of `_tile`, without free slots: [out, in / M, N]."""
    n, m = packed.params["n"], packed.params["m"]
    count, groups, deep = tiles.shape[:3]
    split = tiles.reshape(count, groups, deep, TILE // 2, 2, 2).transpose(0, 4, 3, 1, 2, 5)
    by_row = split.reshape(count * TILE, groups, 2 * deep)[:, :, : n * WIDE // m]
    return by_row.reshape(count * TILE, -1, n)


def _free(tiles: NDArray[np.generic]) -> NDArray[np.generic]:
    """The second slots of the last step of every group of 16."""
    return tiles[:, :, -1, 1::2]


TILED = register(Layout("tiled", pack, unpack, size, tolerates))
