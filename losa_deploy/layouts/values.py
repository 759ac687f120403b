"""Value types: how single weights become codes and back, independent of the layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions, ValueType

LINEAR_TABLE = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
"""The default i4 table: a code is the level as a 4-bit two's complement number."""
BLOCK = 128
"""Positions of a dense i4 row that share 64 bytes: the first half low nibbles, the second high ones."""
F16_MAX = float(np.finfo(np.float16).max)
SMALLER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales that `search` tries, relative to the one at which the largest weight of a group is exact."""


def quantize(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Weight [out, in] → one code per position [out, in], and the components that give them meaning.

    Codes are f32, f16, int8, or uint8 in 0..15 for i4. Zero weights get code 0 in every type.
    Raises `ValueError` for values that the type cannot hold (NaN, infinity, f16 overflow).
    """
    if not np.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values")
    match options.value_type:
        case "f32":
            return weight.astype(np.float32), {}
        case "f16":
            if weight.size and float(np.abs(weight).max()) > F16_MAX:
                raise ValueError(f"a weight of magnitude {np.abs(weight).max():g} does not fit f16")
            return weight.astype(np.float16), {}
        case "i8":
            return _quantize_i8(weight, options)
        case "i4":
            return _quantize_i4(weight, options)


def dequantize(
    codes: NDArray[np.generic],
    value_type: ValueType,
    params: Mapping[str, int],
    arrays: Mapping[str, Component],
) -> NDArray[np.float32]:
    """Codes [out, in] → weight [out, in]: level times scale, one f32 product each."""
    if value_type in ("f32", "f16"):
        plain: NDArray[np.float32] = codes.astype(np.float32)
        return plain
    scale: NDArray[np.float32] = arrays["scale"].astype(np.float32)
    if value_type == "i8":
        rows: NDArray[np.float32] = codes.astype(np.float32) * scale[:, None]
        return rows
    levels: NDArray[np.float32] = arrays["table"].astype(np.float32)[codes]
    product = levels * _spread(scale, params["group_size"], codes.shape[1])
    return product + np.float32(0)  # level 0 times a negative scale is -0; zero is stored as +0


def store_rows(codes: NDArray[np.generic], value_type: ValueType) -> Component:
    """Codes [out, in] → the dense `values` component: [out, in], or [out, ceil(in / 2)] bytes for i4.

    An i4 row is cut into blocks of 128 positions. Of a block of n, byte j holds position j in its low
    nibble and position j + ceil(n / 2) in its high one, so that a kernel splits a block without a shuffle.
    """
    if value_type != "i4":
        return np.ascontiguousarray(codes)
    nibbles: NDArray[np.uint8] = codes.astype(np.uint8)
    rows, columns = nibbles.shape
    packed = np.zeros((rows, -(-columns // 2)), np.uint8)
    for low, high, into in _halves(columns):
        packed[:, into] = nibbles[:, low]
        packed[:, into.start : into.start + high.stop - high.start] |= nibbles[:, high] << np.uint8(4)
    return packed


def load_rows(values: Component, value_type: ValueType, columns: int) -> NDArray[np.generic]:
    """Inverse of `store_rows`."""
    if value_type != "i4":
        return values
    codes = np.empty((values.shape[0], columns), np.uint8)
    packed = values.astype(np.uint8)
    for low, high, into in _halves(columns):
        codes[:, low] = packed[:, into] & np.uint8(15)
        codes[:, high] = packed[:, into.start : into.start + high.stop - high.start] >> np.uint8(4)
    return codes


def _halves(columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """Per block: positions in low nibbles, positions in high nibbles, bytes."""
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        middle = start + -(-(end - start) // 2)
        yield slice(start, middle), slice(middle, end), slice(start // 2, start // 2 + middle - start)


def code_dtype(value_type: ValueType) -> np.dtype[np.generic]:
    """Dtype of one code before it is stored."""
    return np.dtype({"f32": np.float32, "f16": np.float16, "i8": np.int8, "i4": np.uint8}[value_type])


def scale_bytes(shape: tuple[int, int], options: PackOptions) -> int:
    """Bytes of scales and table for a linear of `shape` (out, in)."""
    if options.value_type == "i8":
        return shape[0] * (4 if options.scale_type == "f32" else 2)
    if options.value_type == "i4":
        return shape[0] * group_count(shape[1], options.group_size) * 2 + 16
    return 0


def value_params(options: PackOptions) -> dict[str, int]:
    """Parameters that a value type adds to a packed tensor."""
    return {"group_size": options.group_size} if options.value_type == "i4" else {}


def group_count(in_features: int, group_size: int) -> int:
    """Scales per row; the last group may be short."""
    return -(-in_features // group_size)


def _quantize_i8(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Symmetric, levels -127..127, scale = largest magnitude of the row / 127."""
    top = np.abs(weight).max(axis=1, initial=0.0)
    kind = np.float32 if options.scale_type == "f32" else np.float16
    found = top / np.float32(127) if options.scales is None else options.scales[:, 0]
    scale = found.astype(kind)
    if not np.isfinite(scale).all():
        raise ValueError(f"a row of magnitude {top.max():g} has a scale that does not fit f16")
    levels = np.rint(_divide(weight, scale.astype(np.float32)[:, None]))
    return np.clip(levels, -127, 127).astype(np.int8), {"scale": scale}


def _quantize_i4(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Nearest table level; the group's largest weight sets a signed scale, so that it is nearly exact."""
    table = np.array(options.table, np.int8)
    if table.shape != (16,) or table[0] != 0:
        raise ValueError(f"the i4 table needs 16 levels with level 0 at code 0, found {options.table}")
    out_features, in_features = weight.shape
    size, groups = options.group_size, group_count(in_features, options.group_size)
    padded = np.zeros((out_features, groups * size), np.float32)
    padded[:, :in_features] = weight
    grouped = padded.reshape(out_features, groups, size)
    index = np.abs(grouped).argmax(axis=2)[..., None]
    peak = np.take_along_axis(grouped, index, axis=2)[..., 0]
    widest = table[np.abs(table.astype(np.int16)).argmax()]
    scale = (peak / np.float32(widest)).astype(np.float16)
    if options.scales is not None:
        scale = options.scales.astype(np.float16)
    elif options.search:
        scale = _searched(grouped, scale, table)
    if not np.isfinite(scale).all():
        raise ValueError(f"a group of magnitude {np.abs(peak).max():g} has a scale that does not fit f16")
    levels = _divide(weight, _spread(scale.astype(np.float32), size, in_features))
    return _nearest(levels, table), {"scale": scale, "table": table}


def _searched(
    grouped: NDArray[np.float32], scale: NDArray[np.float16], table: NDArray[np.int8]
) -> NDArray[np.float16]:
    """The scale [out, groups] of the least squared error, of those that are `SMALLER` than `scale`."""
    best, least = scale, np.full(scale.shape, np.inf, np.float32)
    for factor in SMALLER:
        found = (scale.astype(np.float32) * np.float32(factor)).astype(np.float16)
        wide = found.astype(np.float32)[..., None]
        codes = _nearest(_divide(grouped, wide).reshape(len(grouped), -1), table).reshape(grouped.shape)
        error = np.square(table.astype(np.float32)[codes] * wide - grouped).sum(axis=2)
        best, least = np.where(error < least, found, best), np.minimum(error, least)
    return best.astype(np.float16)


def _nearest(levels: NDArray[np.float32], table: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Code of the nearest table level for each real level; a tie goes to the lower level, zero to code 0."""
    if tuple(table.tolist()) == LINEAR_TABLE:
        return np.clip(np.rint(levels), -8, 7).astype(np.int8).astype(np.uint8) & np.uint8(15)
    order = np.argsort(table, kind="stable")
    ranked = table[order].astype(np.float32)
    index = np.searchsorted((ranked[1:] + ranked[:-1]) / 2, levels, side="left")
    codes = order[index].astype(np.uint8)
    return np.where(levels == 0, np.uint8(0), codes)


def _spread(scale: NDArray[np.float32], group_size: int, in_features: int) -> NDArray[np.float32]:
    """Group scales [out, groups] → one per position [out, in]."""
    return np.repeat(scale, group_size, axis=1)[:, :in_features]


def _divide(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """weight / scale, and 0 where the scale is 0 (or underflowed to it)."""
    out = np.zeros_like(weight)
    np.divide(weight, scale, out=out, where=np.broadcast_to(scale != 0, weight.shape))
    return out
