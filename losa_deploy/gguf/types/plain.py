"""Types without blocks: one number after another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.types.base import GgmlType, WeightType, register


def _floats(number: int, name: str, kind: str) -> WeightType:
    dtype = np.dtype(kind)

    def encode(values: NDArray[np.generic], scales: NDArray[np.float16] | None) -> NDArray[np.uint8]:
        return np.ascontiguousarray(values, dtype).view(np.uint8).reshape(len(values), -1)

    def decode(data: bytes) -> NDArray[np.float32]:
        return np.frombuffer(data, dtype).astype(np.float32)

    return WeightType(number, name, 1, dtype.itemsize, encode, decode)


F32 = register(_floats(0, "F32", "<f4"))
F16 = register(_floats(1, "F16", "<f2"))
I8 = register(GgmlType(24, "I8", 1, 1))
"""Bytes: what a packed weight is stored as."""
