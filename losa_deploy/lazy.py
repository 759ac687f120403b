"""Weights that are made when they are asked for, so that few are in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

Weight = NDArray[np.float32]


class Lazy(Mapping[str, Weight]):
    """Module → weight [out, in], made anew each time."""

    def __init__(self, makers: Mapping[str, Callable[[], Weight]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Weight:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def only(self, names: Iterable[str]) -> Lazy:
        """Those with these names."""
        return Lazy({name: self._makers[name] for name in names})

    def joined(self, others: Lazy) -> Lazy:
        """These and others."""
        return Lazy({**self._makers, **others._makers})

    def renamed(self, names: Mapping[str, str]) -> Lazy:
        """Those that are there under `names`, old name → new."""
        return Lazy({new: self._makers[old] for old, new in names.items() if old in self._makers})


def lazily(weights: Mapping[str, Weight]) -> Lazy:
    """Weights of any mapping, looked up when they are asked for."""
    return Lazy({name: partial(weights.__getitem__, name) for name in weights})
