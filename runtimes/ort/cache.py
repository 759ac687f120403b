"""The key/value cache of one sequence in a plain ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime as ort

SMALLEST_BUFFER = 256


@dataclass(frozen=True)
class CacheSpec:
    """The graph's cache: input names, the outputs that replace them, and one tensor's shape."""

    past: tuple[str, ...]
    present: tuple[str, ...]
    kv_heads: int
    head_dim: int
    dtype: np.dtype[np.generic]

    def zeros(self, length: int) -> NDArray[np.generic]:
        """One cache tensor [1, kv_heads, length, head_dim]; untouched pages cost no memory."""
        return np.zeros((1, self.kv_heads, length, self.head_dim), self.dtype)


class GrowingCache:
    """The graph returns a longer cache in every run, which becomes the next run's input.

    Works with every graph; each step writes the whole cache anew, inside ONNX Runtime.
    """

    in_place = False

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        self._values: Sequence[ort.OrtValue] = ()

    def reset(self) -> None:
        """Back to the empty cache."""
        import onnxruntime as ort

        empty = ort.OrtValue.ortvalue_from_numpy(self._spec.zeros(0))
        self._values = [empty] * len(self._spec.past)

    def bind(self, binding: ort.IOBinding, length: int) -> None:
        """Bind the cache for a run after which the sequence has `length` tokens."""
        for name, value in zip(self._spec.past, self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._spec.present:
            binding.bind_output(name, "cpu")

    def take(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Keep the present tensors of the run, in the order in which they were bound."""
        self._values = outputs

    def cut(self, length: int) -> None:
        """Forget what comes after the first `length` tokens."""
        import onnxruntime as ort

        kept = [np.ascontiguousarray(value.numpy()[:, :, :length]) for value in self._values]
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in kept]


class SharedCache:
    """Past and present are one buffer with room to spare; the graph writes only the new rows.

    For graphs whose attention knows the true length from the attention mask (GroupQueryAttention).
    The buffers double when they are full, so that a step copies nothing.
    """

    in_place = True

    def __init__(self, spec: CacheSpec, context_length: int) -> None:
        self._spec = spec
        self._context_length = context_length
        self._arrays: list[NDArray[np.generic]] = []
        self._values: list[ort.OrtValue] = []
        self._bound: ort.IOBinding | None = None
        self.capacity = 0
        """Tokens the buffers have room for."""
        self._used = 0

    def reset(self) -> None:
        """Back to the empty cache; the buffers stay."""
        self._used = 0

    def bind(self, binding: ort.IOBinding, length: int) -> None:
        """Bind the cache for a run after which the sequence has `length` tokens."""
        if length > self.capacity:
            self._grow(length)
            self._bound = None
        self._used = length
        if self._bound is binding:
            return
        for past, present, value in zip(self._spec.past, self._spec.present, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self._bound = binding

    def take(self, outputs: Sequence[ort.OrtValue]) -> None:
        """Nothing to keep: the buffers were written in place."""

    def cut(self, length: int) -> None:
        """Forget what comes after the first `length` tokens: the next run writes over it."""
        self._used = length

    def _grow(self, length: int) -> None:
        import onnxruntime as ort

        capacity = max(SMALLEST_BUFFER, 1 << (length - 1).bit_length())
        self.capacity = min(capacity, self._context_length) if self._context_length else capacity
        grown = [self._spec.zeros(self.capacity) for _ in self._spec.past]
        for old, new in zip(self._arrays, grown, strict=False):
            new[:, :, : self._used] = old[:, :, : self._used]
        self._arrays = grown
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in grown]
