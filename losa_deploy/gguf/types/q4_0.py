"""Q4_0: 32 weights, an f16 scale and a level from -8 to 7 each.

A code is the level plus 8. Byte j of a block holds the codes of the positions j (low nibble) and j + 16.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.types.base import WeightType, register, scaled_blocks

WEIGHTS = 32
HALF = WEIGHTS // 2
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", HALF)])


def encode(levels: NDArray[np.generic], scales: NDArray[np.float16] | None) -> NDArray[np.uint8]:
    """Levels -8..7 as int8; `ValueError` for others."""
    assert scales is not None
    if levels.size and not -8 <= int(levels.min()) <= int(levels.max()) <= 7:
        raise ValueError(f"Q4_0 has levels from -8 to 7, found {levels.min()} to {levels.max()}")
    codes = (levels.astype(np.int8) + np.int8(8)).view(np.uint8).reshape(len(levels), -1, 2, HALF)
    return scaled_blocks(scales, codes[:, :, 0] | codes[:, :, 1] << np.uint8(4))


def decode(data: bytes) -> NDArray[np.float32]:
    blocks = np.frombuffer(data, BLOCK)
    codes = blocks["codes"]
    levels = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - np.float32(8)
    values: NDArray[np.float32] = levels * blocks["scale"].astype(np.float32)[:, None]
    return (values + np.float32(0)).reshape(-1)  # level 0 times a negative scale is -0


Q4_0 = register(WeightType(2, "Q4_0", WEIGHTS, BLOCK.itemsize, encode, decode))
