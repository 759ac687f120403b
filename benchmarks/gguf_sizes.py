"""What the blocks of a GGUF file really take: quantizers mix types, and fall back where rows do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from losa_deploy.gguf.file import Tensor, open_any
from losa_deploy.gguf.names import BLOCKS, PREFIX
from losa_deploy.gguf.types import WeightType
from losa_deploy.gguf.view import expanded

PACKED = PREFIX + BLOCKS


@dataclass(frozen=True)
class BlockSizes:
    """The weight matrices of all blocks, embedding and head left out."""

    bytes: int
    weights: int
    """Of a packed file, whose tensors do not say how many they hold, its bytes."""
    types: Mapping[str, int]
    """Name of each tensor type, e.g. Q4_0 → matrices stored as it."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8.0 * self.bytes / max(1, self.weights)


def zero_share(path: Path) -> float:
    """Share of exact zeros in the first weight matrix of a block; 0 in a file without one that we decode.

    A dense model has hardly any, one that was pruned and written dense about as many as were pruned.
    Raises `InputError` if the file is damaged.
    """
    with open_any(path) as file:
        for tensor in file.tensors:
            if _is_block_matrix(tensor) and isinstance(tensor.type, WeightType):
                zeros = sum(int((part == 0).sum()) for part in expanded(file, tensor))
                return zeros / prod(tensor.dims)
    return 0.0


def block_sizes(path: Path) -> BlockSizes:
    """Sizes in a GGUF file; `InputError` if it is damaged."""
    with open_any(path) as file:
        tensors = [
            tensor for tensor in file.tensors if _is_block_matrix(tensor) or tensor.name.startswith(PACKED)
        ]
    types = Counter(tensor.type.name for tensor in tensors)
    count = sum(prod(tensor.dims) for tensor in tensors)
    return BlockSizes(sum(tensor.bytes for tensor in tensors), count, dict(sorted(types.items())))


def _is_block_matrix(tensor: Tensor) -> bool:
    return tensor.name.startswith(BLOCKS) and len(tensor.dims) == 2
