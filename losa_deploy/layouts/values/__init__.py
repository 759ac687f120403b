"""Value types, one file each: how single weights become codes and back, independent of the layout.

A new one is a file with a class like those here, and a line below that imports it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions
from losa_deploy.layouts.values import floats, i3, i4, i8
from losa_deploy.layouts.values.base import VALUE_TYPES, ValueType, by_bits, by_number, register

__all__ = [
    "VALUE_TYPES",
    "ValueType",
    "by_bits",
    "by_number",
    "dequantize",
    "floats",
    "i3",
    "i4",
    "i8",
    "quantize",
    "register",
]


def quantize(
    weight: NDArray[np.float32], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Weight [out, in] → one code per position [out, in], and the components that give codes their meaning.

    Zero weights get code 0 in every type. Raises `ValueError` for values that the type cannot hold (NaN,
    infinity, f16 overflow).
    """
    if not np.isfinite(weight).all():
        raise ValueError("the weight has NaN or infinite values")
    return VALUE_TYPES[options.value_type].quantize(weight, options)


def dequantize(
    codes: NDArray[np.generic],
    value_type: str,
    params: Mapping[str, int],
    arrays: Mapping[str, Component],
) -> NDArray[np.float32]:
    """Codes [out, in] → weight [out, in]: level times scale, one f32 product each."""
    return VALUE_TYPES[value_type].dequantize(codes, params, arrays)
