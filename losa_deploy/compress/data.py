"""The text a phase through the whole model trains on: several sources with shares, in shuffled epochs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from losa_deploy.compress.seeds import generator
from losa_deploy.errors import InputError
from losa_deploy.phases import PhaseRecipe
from losa_deploy.text.corpus import read_documents, token_stream
from losa_deploy.text.tokenizer import load_tokenizer


def phase_tokens(phase: PhaseRecipe, calibration: Tensor, folder: Path, seed: int) -> Tensor:
    """Distinct sequences [n, length] int64 of a phase, its sources mixed by their shares.

    `calibration` [samples, length] is used as it is; other text is cut into windows with the tokenizer in
    `folder`. The source that has the least for its share decides how many sequences there are; with one
    source, all. Raises `InputError` for text that gives no sequence, or lengths that differ.
    """
    length = phase.sequence_length or calibration.shape[1]
    total = sum(item.share for item in phase.data)
    found = []
    for item in phase.data:
        if item.source == "calibration":
            if calibration.shape[1] != length:
                raise InputError(
                    f"The calibration has sequences of {calibration.shape[1]} tokens, the phase asks for "
                    f"{length}.",
                    hint="Leave the phase's sequence_length at 0, or set calibration.sequence_length.",
                )
            windows = calibration
        else:
            windows = text_windows(folder, Path(item.source), length, seed)
        found.append((windows, item.share / total))
    count = min(windows.shape[0] / share for windows, share in found)
    return torch.cat([windows[: max(1, round(count * share))] for windows, share in found])


def text_windows(folder: Path, source: Path, length: int, seed: int) -> Tensor:
    """All windows [n, length] of a text in a seeded order; `InputError` if it has none."""
    stream = token_stream(load_tokenizer(folder), read_documents(source))
    available = len(stream) // length
    if not available:
        raise InputError(
            f"{source} has {len(stream)} tokens, fewer than one sequence of {length}.",
            hint="Give more text, or lower sequence_length.",
        )
    order = np.random.default_rng(seed).permutation(available)
    return torch.from_numpy(stream[: available * length].reshape(available, length)[order])


class Batches:
    """Numbered batches of indices: every epoch is a permutation, drawn from the seed and its number alone.

    A resumed run therefore goes on with the same batches.
    """

    def __init__(self, count: int, size: int, seed: int, *labels: str | int) -> None:
        self._count, self._size = count, size

        @lru_cache(maxsize=2)
        def epoch(number: int) -> list[int]:
            draw = generator(seed, *labels, "epoch", number)
            order: list[int] = torch.randperm(count, generator=draw).tolist()
            return order

        self._epoch = epoch

    def __getitem__(self, number: int) -> list[int]:
        """Indices of batch `number`, counted from 0 without end."""
        places = range(number * self._size, (number + 1) * self._size)
        return [self._epoch(place // self._count)[place % self._count] for place in places]
