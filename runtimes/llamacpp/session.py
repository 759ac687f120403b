"""One sequence in a llama.cpp context that grows with it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from losa_deploy.bindings.llama_cpp import logged_errors
from losa_deploy.errors import LosaError, ResourceError

from ..facts import check_step, check_steps, check_tokens

BATCH = 512
"""Tokens that llama.cpp is given at once."""
SMALLEST_CONTEXT = 512
F32, F16 = 0, 1
"""ggml's numbers of these types."""


@dataclass
class Model:
    """A loaded model; `free` may be called twice."""

    library: ModuleType
    handle: int | None
    float_cache: bool
    """The cache is f32 and attention is computed step by step, so that nothing is rounded to f16."""
    vocab_size: int = field(init=False)
    context_length: int = field(init=False)
    """What the model was trained for; 0 if the file does not say."""

    def __post_init__(self) -> None:
        vocabulary = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size = int(self.library.llama_vocab_n_tokens(vocabulary))
        self.context_length = max(0, int(self.library.llama_model_n_ctx_train(self.handle)))

    def new_context(self, length: int, threads: int, *, sequences: int = 1) -> int:
        """A context for `length` tokens, divided among `sequences`; `ResourceError` if memory is short."""
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx = length
        parameters.n_seq_max = sequences
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        if self.float_cache:
            parameters.type_k = parameters.type_v = F32
            parameters.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with logged_errors() as lines:
            context = self.library.llama_init_from_model(self.handle, parameters)
        if not context:
            reason = (lines or ["it gave no reason"])[-1].strip()
            raise ResourceError(
                f"llama.cpp has no room for a context of {length} tokens: {reason}.",
                hint="Close other programs, or use shorter texts.",
            )
        return int(context)

    def free(self) -> None:
        """Give the weights back."""
        if self.handle is not None:
            self.library.llama_model_free(self.handle)
            self.handle = None


class LlamaCppSession:
    """One sequence; its context starts small and doubles when it is full."""

    def __init__(self, model: Model, threads: int) -> None:
        self._model: Model | None = model
        self._library = model.library
        self._threads = threads
        self._length = 0
        self._capacity = 0
        self._context: int | None = None
        self.vocab_size = model.vocab_size
        self.context_length = model.context_length
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (BATCH,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (BATCH,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (BATCH,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (BATCH,))[:] = 1
        for index in range(BATCH):
            self._batch.seq_id[index][0] = 0
        try:
            self._make_room(1)
        except BaseException:
            self.close()
            raise

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        self._start(len(tokens))
        result = np.empty((len(tokens), self.vocab_size), np.float32)
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._decode(part, start, every=True)
            rows = self._library.llama_get_logits(self._context)
            result[start : start + len(part)] = np.ctypeslib.as_array(rows, (len(part), self.vocab_size))
        self._start(0)
        return result

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        self._start(len(tokens))
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._decode(part, start, last=start + len(part) == len(tokens))
        self._length = len(tokens)
        return self._last()

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        check_step(token, self._length, self.vocab_size, self.context_length)
        if self._length >= self._capacity:
            self._make_room(self._length + 1)
        self._decode((token,), self._length, last=True)
        self._length += 1
        return self._last()

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append up to `BATCH` tokens in one pass; logits [len(tokens), vocab] after each."""
        length = self._length + len(tokens)
        check_steps(tokens, self._length, self.vocab_size, self.context_length)
        if length > self._capacity:
            self._make_room(length)
        self._decode(tokens, self._length, every=True)
        self._length = length
        rows = self._library.llama_get_logits(self._context)
        return np.array(np.ctypeslib.as_array(rows, (len(tokens), self.vocab_size)), np.float32)

    def rewind(self, length: int) -> bool:
        """Forget what comes after the first `length` tokens; False if this model's cache cannot."""
        memory = self._library.llama_get_memory(self._open_context())
        if not self._library.llama_memory_seq_rm(memory, 0, length, -1):
            return False
        self._length = length
        return True

    def close(self) -> None:
        """Free the context and the model."""
        if self._model is None:
            return
        self._free_context()
        self._library.llama_batch_free(self._batch)
        self._model.free()
        self._model = None

    def _start(self, length: int) -> None:
        """An empty cache with room for `length` tokens."""
        self._length = 0
        context = self._open_context()
        self._library.llama_memory_clear(self._library.llama_get_memory(context), False)
        if length > self._capacity:
            self._make_room(length)

    def _open_context(self) -> int:
        if self._context is None:
            raise RuntimeError("the session is closed")
        return self._context

    def _make_room(self, length: int) -> None:
        """A new context for at least `length` tokens, with the sequence so far."""
        assert self._model is not None
        capacity = max(SMALLEST_CONTEXT, 1 << (length - 1).bit_length())
        if self.context_length:
            capacity = min(capacity, self.context_length)
        saved = self._saved() if self._length else None
        self._free_context()
        self._context = self._model.new_context(capacity, self._threads)
        self._capacity = capacity
        if saved is not None:
            taken = self._library.llama_state_seq_set_data(self._context, saved, len(saved), 0)
            if taken != len(saved):
                raise LosaError(
                    f"llama.cpp took {taken} of {len(saved)} bytes of its own cache back.",
                    hint="Please report this with the name of the model.",
                )

    def _saved(self) -> ctypes.Array[ctypes.c_uint8]:
        """The cache of the sequence."""
        size = int(self._library.llama_state_seq_get_size(self._context, 0))
        data = (ctypes.c_uint8 * size)()
        self._library.llama_state_seq_get_data(self._context, data, size, 0)
        return data

    def _free_context(self) -> None:
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None

    def _decode(
        self, tokens: Sequence[int], position: int, *, every: bool = False, last: bool = False
    ) -> None:
        """Run up to `BATCH` tokens; logits of all, of the last one, or of none."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._wanted[:count] = every
        self._wanted[count - 1] = every or last
        status = self._library.llama_decode(self._open_context(), self._batch)
        if status != 0:
            self._length = 0
            raise LosaError(
                f"llama.cpp could not compute {count} tokens at position {position} (status {status}).",
                hint="Close other programs if memory is short; run `losa-deploy doctor`.",
            )

    def _last(self) -> NDArray[np.float32]:
        row = self._library.llama_get_logits_ith(self._context, -1)
        return np.array(np.ctypeslib.as_array(row, (self.vocab_size,)), np.float32)
