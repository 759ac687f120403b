"""Value types: how single weights become codes and back, independent of the layout."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions, ValueType

ZERO_CODE: Mapping[ValueType, int] = {"f32": 0, "f16": 0, "i8": 0, "i4": 8}
"""The code of an exact zero."""
F16_MAX = float(np.finfo(np.float16).max)


def quantize(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Weight [out, in] → one code per position [out, in], and the components that give them meaning.

    Codes are f32, f16, int8, or uint8 in 0..15 for i4. Zero weights get the zero code.
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


def store(codes: NDArray[np.generic], value_type: ValueType) -> Component:
    """Codes [..., n] → the `values` component: i4 codes two per byte along the last axis, low nibble first.

    An odd n is completed with the zero code.
    """
    if value_type != "i4":
        return np.ascontiguousarray(codes)
    nibbles = codes.astype(np.uint8)
    if nibbles.shape[-1] % 2:
        zero = np.full((*nibbles.shape[:-1], 1), ZERO_CODE["i4"], np.uint8)
        nibbles = np.concatenate([nibbles, zero], axis=-1)
    packed: NDArray[np.uint8] = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed


def load(values: Component, value_type: ValueType, count: int) -> NDArray[np.generic]:
    """Inverse of `store` for `count` codes along the last axis."""
    if value_type != "i4":
        return values[..., :count]
    packed = values.astype(np.uint8)
    nibbles = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return nibbles.reshape(*packed.shape[:-1], -1)[..., :count]


def code_dtype(value_type: ValueType) -> np.dtype[np.generic]:
    """Dtype of one code before `store`."""
    return np.dtype({"f32": np.float32, "f16": np.float16, "i8": np.int8, "i4": np.uint8}[value_type])


def value_bytes(count: int, value_type: ValueType) -> int:
    """Bytes of `count` stored values."""
    return (count + 1) // 2 if value_type == "i4" else count * code_dtype(value_type).itemsize


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
    scale = (top / np.float32(127)).astype(np.float32 if options.scale_type == "f32" else np.float16)
    if not np.isfinite(scale).all():
        raise ValueError(f"a row of magnitude {top.max():g} has a scale that does not fit f16")
    levels = np.rint(_divide(weight, scale.astype(np.float32)[:, None]))
    return np.clip(levels, -127, 127).astype(np.int8), {"scale": scale}


def _quantize_i4(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Nearest table level; the group's largest weight sets a signed scale, so that it is nearly exact."""
    table = np.array(options.table, np.int8)
    if table.shape != (16,) or table[ZERO_CODE["i4"]] != 0:
        raise ValueError(f"the i4 table needs 16 levels with level 0 at code 8, found {options.table}")
    out_features, in_features = weight.shape
    size, groups = options.group_size, group_count(in_features, options.group_size)
    padded = np.zeros((out_features, groups * size), np.float32)
    padded[:, :in_features] = weight
    grouped = padded.reshape(out_features, groups, size)
    index = np.abs(grouped).argmax(axis=2)[..., None]
    peak = np.take_along_axis(grouped, index, axis=2)[..., 0]
    widest = table[np.abs(table.astype(np.int16)).argmax()]
    scale = (peak / np.float32(widest)).astype(np.float16)
    if not np.isfinite(scale).all():
        raise ValueError(f"a group of magnitude {np.abs(peak).max():g} has a scale that does not fit f16")
    levels = _divide(weight, _spread(scale.astype(np.float32), size, in_features))
    return _nearest(levels, table), {"scale": scale, "table": table}


def _nearest(levels: NDArray[np.float32], table: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Code of the nearest table level for each real level; a tie goes to the lower code, zero to code 8."""
    if table.tolist() == list(range(-8, 8)):
        return (np.clip(np.rint(levels), -8, 7) + 8).astype(np.uint8)
    order = np.argsort(table, kind="stable")
    ranked = table[order].astype(np.float32)
    index = np.searchsorted((ranked[1:] + ranked[:-1]) / 2, levels, side="left")
    codes = order[index].astype(np.uint8)
    return np.where(levels == 0, np.uint8(ZERO_CODE["i4"]), codes)


def _spread(scale: NDArray[np.float32], group_size: int, in_features: int) -> NDArray[np.float32]:
    """Group scales [out, groups] → one per position [out, in]."""
    return np.repeat(scale, group_size, axis=1)[:, :in_features]


def _divide(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """weight / scale, and 0 where the scale is 0 (or underflowed to it)."""
    out = np.zeros_like(weight)
    np.divide(weight, scale, out=out, where=np.broadcast_to(scale != 0, weight.shape))
    return out
