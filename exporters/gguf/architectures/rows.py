"""In which order the rows of a linear are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from .config import head_count, kv_head_count

RowOrder = Callable[[Mapping[str, object], str, int], NDArray[np.intp] | None]
"""config.json, module, rows → which row of the module each stored one is, None if all stay."""


def as_they_are(config: Mapping[str, object], module: str, rows: int) -> None:
    """llama.cpp rotates the halves of a head against each other, as Hugging Face does."""
    return


def interleaved_heads(config: Mapping[str, object], module: str, rows: int) -> NDArray[np.intp] | None:
    """Of q and k; llama.cpp's rotary embedding takes neighbours."""
    heads = {"q_proj": head_count, "k_proj": kv_head_count}
    count = heads.get(module.rpartition(".")[2])
    return None if count is None else interleaved(rows, count(config))


def interleaved(rows: int, heads: int) -> NDArray[np.intp]:
    """Order [rows]: of each head the first row of the first half, the first of the second, and so on."""
    order: NDArray[np.intp] = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
    return order
