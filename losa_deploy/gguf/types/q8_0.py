"""Q8_0: 32 weights, an f16 scale and an int8 level each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.types.base import WeightType, register, scaled_blocks

WEIGHTS = 32
BLOCK = np.dtype([("scale", "<f2"), ("levels", "i1", WEIGHTS)])


def encode(levels: NDArray[np.generic], scales: NDArray[np.float16] | None) -> NDArray[np.uint8]:
    """Levels -128..127 as int8."""
    assert scales is not None
    bodies = np.ascontiguousarray(levels, np.int8).view(np.uint8)
    return scaled_blocks(scales, bodies.reshape(len(levels), -1, WEIGHTS))


def decode(data: bytes) -> NDArray[np.float32]:
    blocks = np.frombuffer(data, BLOCK)
    values: NDArray[np.float32] = (
        blocks["levels"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    )
    return values.reshape(-1)


Q8_0 = register(WeightType(8, "Q8_0", WEIGHTS, BLOCK.itemsize, encode, decode))
