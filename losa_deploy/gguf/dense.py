"""Dense weights of our value types in ggml's: the values are the same, so that packing them loses nothing."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from losa_deploy.gguf.types import F16, TYPES, WeightType
from losa_deploy.layouts import VALUE_TYPES as OURS
from losa_deploy.layouts.values import by_number

BY_NAME: Mapping[str, WeightType] = {
    kind.name: kind for kind in TYPES.values() if isinstance(kind, WeightType)
}
VALUE_TYPES: Mapping[WeightType, str] = {BY_NAME[kind.ggml]: kind.name for kind in reversed(by_number())}
"""Type of a dense tensor → the first value type that is stored so: Q4_0 holds i4, and i3, which has fewer
levels."""


def stock_type(value_type: str) -> WeightType:
    """Type of ggml for whole blocks of a value type."""
    return BY_NAME[OURS[value_type].ggml]


def dense_type(value_type: str, columns: int) -> WeightType:
    """Type of a dense weight in a portable file: F16 where rows are no whole blocks."""
    kind = stock_type(value_type)
    return kind if kind.fits(columns) else F16


def dense_gguf_bytes(value_type: str, shape: tuple[int, int]) -> int:
    """Bytes of a weight [out, in] in a portable file."""
    return dense_type(value_type, shape[1]).nbytes(prod(shape))


def is_narrower(value_type: str) -> bool:
    """True if the codes of a value type take fewer bits than in ggml's type for it."""
    return OURS[value_type].bits < OURS[VALUE_TYPES[stock_type(value_type)]].bits


def scale_group(kind: WeightType) -> int:
    """Positions per scale of a weight stored as tensor type `kind`; 0 where no group shares one."""
    return kind.weights if OURS[VALUE_TYPES[kind]].grouped else 0
