"""What the blocks of a GGUF file really take: quantizers mix types, and fall back where rows do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.errors import InputError

BLOCK = "blk."
PACKED = "losa.blk."


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


def block_sizes(path: Path) -> BlockSizes:
    """Sizes in a GGUF file; `InputError` if it cannot be read."""
    from gguf import GGUFReader

    try:
        tensors = [
            t
            for t in GGUFReader(path).tensors
            if (t.name.startswith(BLOCK) and len(t.shape) == 2) or t.name.startswith(PACKED)
        ]
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise InputError(f"{path} cannot be read as GGUF: {error}.", hint="Make the file again.") from None
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    count = sum(int(tensor.n_elements) for tensor in tensors)
    return BlockSizes(sum(int(tensor.n_bytes) for tensor in tensors), count, dict(sorted(types.items())))
