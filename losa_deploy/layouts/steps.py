"""Slots of 16 rows side by side: what the layouts with tiles share.

A *step* is two slots of each row of a tile. Slots whose positions take two bits lie in *lines* of 32 bytes,
each with the same few bits of several steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions, Shapes
from losa_deploy.layouts.values import ValueType

TILE = 16
"""Rows of a tile; its columns are a multiple of it too."""
STEP = 2 * TILE
"""Slots of a step: two of each row of a tile."""
Codes = NDArray[np.uint8]


def stores(kind: ValueType) -> bool:
    """Integers only."""
    return kind.bits <= 8


def is_whole(shape: tuple[int, ...]) -> bool:
    """Whether rows and columns are a multiple of 16; a tensor without weights is not."""
    return all(length > 0 and length % TILE == 0 for length in shape)


def sizes_of(
    found: Shapes, shape: tuple[int, int], kind: ValueType, options: PackOptions
) -> Mapping[str, int]:
    """Component → bytes of a tensor (out, in) whose positions and values have the shapes `found`."""
    stored = {name: prod(found[name] or ()) for name in ("positions", "values") if name in found}
    return {**stored, **kind.meaning_bytes(shape, options)}


def to_tiles(slots: NDArray[np.generic]) -> Codes:
    """[out, in / 16, slots] → [tiles, in / 16, steps, 32]: byte 4 i + 2 h + k is slot k of row 8 h + i."""
    rows, groups, count = slots.shape
    deep = -(-count // 2)
    even = np.zeros((rows, groups, 2 * deep), slots.dtype)
    even[:, :, :count] = slots
    split = even.reshape(rows // TILE, 2, TILE // 2, groups, deep, 2)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 2, 1, 5)).reshape(rows // TILE, groups, deep, STEP)


def by_row(tiles: NDArray[np.generic]) -> NDArray[np.generic]:
    """Inverse of `to_tiles`, with the slots that fill the last step of a group: [out, in / 16, 2 * steps]."""
    count, groups, deep = tiles.shape[:3]
    split = tiles.reshape(count, groups, deep, TILE // 2, 2, 2).transpose(0, 4, 3, 1, 2, 5)
    return split.reshape(count * TILE, groups, 2 * deep)


def scale_shape(shape: tuple[int, int], kind: ValueType, group_size: int) -> tuple[int, ...] | None:
    """Of the scales of a matrix (out, in): those of groups lie together by tile."""
    found = kind.scale_shape(shape, group_size)
    return (shape[0] // TILE, found[1], TILE) if kind.grouped and found is not None else found


def scales_by_tile(meaning: Mapping[str, Component], kind: ValueType) -> dict[str, Component]:
    """Scales [out, groups] → [tiles, groups, 16]; other components, and scales of rows, stay as they are."""
    if not kind.grouped:
        return dict(meaning)
    scale = meaning["scale"]
    by_tile = scale.reshape(scale.shape[0] // TILE, TILE, -1).transpose(0, 2, 1)
    return {**meaning, "scale": np.ascontiguousarray(by_tile)}


def scales_by_row(arrays: Mapping[str, Component], kind: ValueType) -> dict[str, Component]:
    """Inverse of `scales_by_tile`."""
    if not kind.grouped:
        return dict(arrays)
    tiles, groups, _ = arrays["scale"].shape
    return {**arrays, "scale": arrays["scale"].transpose(0, 2, 1).reshape(tiles * TILE, groups)}


def line_count(steps: int, bits: int) -> int:
    """Lines of 32 bytes that hold `bits` bits of each slot of so many steps."""
    return -(-steps * bits // 8)


def line_shapes(tiles: int, steps: int, kind: ValueType) -> Shapes:
    """Of positions and values of `steps` steps per tile in lines."""
    codes = sum(line_count(steps, bits) for bits in kind.planes)
    return {"positions": (tiles, line_count(steps, 2), STEP), "values": (tiles, codes, STEP)}


def store_lines(positions: Codes, values: Codes, kind: ValueType) -> dict[str, Component]:
    """Steps of a tile in one sequence: positions of four in a line of 32 bytes, codes by their planes."""
    steps_of_tile = positions.reshape(positions.shape[0], -1, STEP)
    values = values.reshape(steps_of_tile.shape)
    if kind.bits == 8:
        return {"positions": _join(steps_of_tile, 2), "values": values}
    planes, low = [], 0
    for bits in kind.planes:
        planes.append(_join(values >> np.uint8(low) & np.uint8((1 << bits) - 1), bits))
        low += bits
    return {"positions": _join(steps_of_tile, 2), "values": np.concatenate(planes, axis=1)}


def load_lines(
    arrays: Mapping[str, Component], shape: tuple[int, ...], kind: ValueType
) -> tuple[Codes, NDArray[np.generic]]:
    """Inverse of `store_lines`; positions and values of `shape`, [tiles, groups, steps, 32]."""
    count = shape[1] * shape[2]
    positions = _split(arrays["positions"], 2)[:, :count].reshape(shape)
    if kind.bits == 8:
        return positions, arrays["values"].reshape(shape)
    values, first, low = np.zeros((shape[0], count, STEP), np.uint8), 0, 0
    for bits in kind.planes:
        lines = line_count(count, bits)
        plane = _split(arrays["values"][:, first : first + lines], bits)[:, :count]
        values |= plane << np.uint8(low)
        first, low = first + lines, low + bits
    return positions, values.reshape(shape)


def lines_are_canonical(
    arrays: Mapping[str, Component], positions: Codes, values: NDArray[np.generic], kind: ValueType
) -> bool:
    """Whether `arrays` hold nothing but these slots: bits of steps that are not there are zero."""
    again = store_lines(positions, values.astype(np.uint8), kind)
    return all(np.array_equal(again[name], arrays[name].view(np.uint8)) for name in again)


def _join(steps: Codes, bits: int) -> Codes:
    """[tiles, steps, 32] of few bits → [tiles, lines, 32], the first step of a line in the lowest bits."""
    count, (tiles, used, _) = 8 // bits, steps.shape
    whole = np.zeros((tiles, line_count(used, bits) * count, STEP), np.uint8)
    whole[:, :used] = steps
    split = whole.reshape(tiles, -1, count, STEP)
    shifts = bits * np.arange(count, dtype=np.uint8)[:, None]
    joined: Codes = np.bitwise_or.reduce(split << shifts, axis=2)
    return joined


def _split(lines: Component, bits: int) -> Codes:
    """Inverse of `_join`, with the steps that fill the last line."""
    count = 8 // bits
    shifts = bits * np.arange(count, dtype=np.uint8)[:, None]
    steps: Codes = lines.astype(np.uint8)[:, :, None, :] >> shifts & np.uint8(2**bits - 1)
    return steps.reshape(lines.shape[0], -1, STEP)
