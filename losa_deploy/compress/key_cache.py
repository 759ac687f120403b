"""Keys and values of a text that grows token by token, in memory that is taken once."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Those of one block, [batch, heads, tokens, head size], for up to `length` tokens.

    transformers' own layer copies everything that it holds for each token.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.count = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.device = key_states.device
        self.all_keys = key_states.new_empty(batch, heads, self.length, size)
        self.all_values = value_states.new_empty(batch, heads, self.length, value_states.shape[-1])
        self.keys, self.values = self.all_keys[:, :, :0], self.all_values[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **others: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens; gives those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, after = self.count, self.count + key_states.shape[2]
        self.all_keys[:, :, before:after] = key_states
        self.all_values[:, :, before:after] = value_states
        self.keys, self.values = self.all_keys[:, :, :after], self.all_values[:, :, :after]
        self.count = after
        return self.keys, self.values


def key_cache(blocks: int, length: int) -> Cache:
    """Room for `length` tokens in each block. Blocks with a window keep what is outside of it, too."""
    return Cache(layers=[_Layer(length) for _ in range(blocks)])
