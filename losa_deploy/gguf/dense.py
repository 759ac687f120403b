"""Dense weights of our value types in ggml's: the values are the same, so that packing them loses nothing."""

from __future__ import annotations

from math import prod

from losa_deploy.gguf.types import F16, F32, Q4_0, Q8_0, WeightType
from losa_deploy.layouts.base import ValueType

DENSE_TYPES: dict[ValueType, WeightType] = {"i8": Q8_0, "i4": Q4_0, "f16": F16, "f32": F32}
"""Value type → type of a dense tensor."""
VALUE_TYPES: dict[WeightType, ValueType] = {kind: name for name, kind in DENSE_TYPES.items()}


def dense_type(value_type: ValueType, columns: int) -> WeightType:
    """Type of a dense weight in a portable file: F16 where rows are no whole blocks."""
    kind = DENSE_TYPES[value_type]
    return kind if kind.fits(columns) else F16


def dense_gguf_bytes(value_type: ValueType, shape: tuple[int, int]) -> int:
    """Bytes of a weight [out, in] in a portable file."""
    return dense_type(value_type, shape[1]).nbytes(prod(shape))


def scale_group(kind: WeightType) -> int:
    """Positions per scale of an i4 weight stored as tensor type `kind`; 0 for types that are not i4."""
    return kind.weights if VALUE_TYPES[kind] == "i4" else 0
