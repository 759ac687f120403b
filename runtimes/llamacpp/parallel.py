"""Several sequences in one llama.cpp context, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import LosaError

from .session import BATCH, Model

DEFAULT_CONTEXT = 4096
"""Tokens of a slot if nothing else is asked for; the caches of all slots are allocated at once."""


class Row(Protocol):
    """One token of a batch, as the server's scheduler describes it."""

    @property
    def slot(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def wanted(self) -> bool: ...


class LlamaCppSlots:
    """A model with `slots` sequences of up to `context_length` tokens each."""

    def __init__(self, model: Model, *, threads: int, slots: int, context: int) -> None:
        """Takes the model over; `context` 0: the model's own length, at most 4096.

        Raises `ResourceError` if there is no memory for the caches.
        """
        own = model.context_length
        self.context_length = min(context or min(DEFAULT_CONTEXT, own or DEFAULT_CONTEXT), own or context)
        self.vocab_size = model.vocab_size
        self.slots = slots
        self.batch = BATCH
        self._library: ModuleType = model.library
        self._model: Model | None = model
        try:
            self._context = model.new_context(slots * self.context_length, threads, sequences=slots)
        except BaseException:
            model.free()
            raise
        self._rows = self._library.llama_batch_init(BATCH, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._rows.token, (BATCH,))
        self._positions = np.ctypeslib.as_array(self._rows.pos, (BATCH,))
        self._wanted = np.ctypeslib.as_array(self._rows.logits, (BATCH,))
        np.ctypeslib.as_array(self._rows.n_seq_id, (BATCH,))[:] = 1

    def decode(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """Append the rows to their sequences; logits [vocab] of the wanted ones, in order."""
        self._rows.n_tokens = len(rows)
        for index, row in enumerate(rows):
            self._tokens[index] = row.token
            self._positions[index] = row.position
            self._wanted[index] = row.wanted
            self._rows.seq_id[index][0] = row.slot
        status = self._library.llama_decode(self._context, self._rows)
        if status != 0:
            raise LosaError(
                f"llama.cpp could not compute a batch of {len(rows)} tokens (status {status}).",
                hint="Close other programs if memory is short; run `losa-deploy doctor`.",
            )
        return [self._logits(index) for index, row in enumerate(rows) if row.wanted]

    def cut(self, slot: int, length: int) -> int:
        """Forget what the sequence holds beyond its first `length` tokens; how many of these are kept.

        Some caches (of sliding windows, of recurrent models) can only be emptied: then it is 0.
        """
        memory = self._library.llama_get_memory(self._context)
        if self._library.llama_memory_seq_rm(memory, slot, length, -1):
            return length
        self._library.llama_memory_seq_rm(memory, slot, -1, -1)
        return 0

    def close(self) -> None:
        """Free the context and the model."""
        if self._model is None:
            return
        self._library.llama_free(self._context)
        self._library.llama_batch_free(self._rows)
        self._model.free()
        self._model = None

    def _logits(self, index: int) -> NDArray[np.float32]:
        row = self._library.llama_get_logits_ith(self._context, index)
        return np.array(np.ctypeslib.as_array(row, (self.vocab_size,)), np.float32)
