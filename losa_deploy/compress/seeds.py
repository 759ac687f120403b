"""Random streams that depend on the seed and on what they are for, not on what ran before.

A resumed run therefore draws the same numbers as one that was never interrupted.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator seeded by SHA-256 of the seed and the labels, e.g. `generator(0, "adapt", 3)`."""
    digest = hashlib.sha256("/".join(map(str, (seed, *labels))).encode()).digest()
    result = torch.Generator(device="cpu")
    result.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return result
