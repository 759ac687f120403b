"""A model in ik_llama.cpp, in a process of its own: two builds of llama.cpp cannot live in one.

`python -m losa_deploy.benchmarks.ik.worker PACKAGE MODEL THREADS` answers each line of JSON on stdin with a
line of JSON and the logits, as f32, after it. With `--probe` it prints what `benchmarks.probe` prints.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, LosaError, MissingError, ResourceError

from ..process_worker import answer
from .package import DISTRIBUTION, MODULE, TESTED

BATCH = 512
"""Tokens that it is given at once, as our own session does."""
SMALLEST_CONTEXT = 512
MARGIN = 256
"""Tokens that a context has room for beyond the prompt."""


class IkModel:
    """A model with one sequence. Weights are repacked while they are loaded; all else is as by default."""

    context_length = 0
    """It grows with the sequence."""

    def __init__(self, package: Path, model: Path, threads: int) -> None:
        self._library = load_library(package)
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_mmap = False  # what is mapped cannot be repacked
        parameters.repack_tensors = True
        self._model = self._library.llama_model_load_from_file(str(model).encode(), parameters)
        if not self._model:
            raise InputError(
                f"ik_llama.cpp cannot open {model}.", hint="Make the file again, or leave this peer out."
            )
        self.vocab_size = int(
            self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        )
        self._threads = threads
        self._context: int | None = None
        self._capacity = 0
        self._tokens: list[int] = []
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)
        self._ids = np.ctypeslib.as_array(self._batch.token, (BATCH,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (BATCH,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (BATCH,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (BATCH,))[:] = 1
        for index in range(BATCH):
            self._batch.seq_id[index][0] = 0
        self._make_room(1)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        return np.stack(self._start(tokens, every=True))

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        return self._start(tokens, every=False)[-1]

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        position = len(self._tokens)
        if position >= self._capacity:
            return self._start([*self._tokens, token], every=False)[-1]  # a larger context starts empty
        self._tokens.append(token)
        self._decode((token,), position, every=False, last=True)
        return self._row(0)

    def close(self) -> None:
        """Nothing: the process ends with it."""

    def _start(self, tokens: Sequence[int], *, every: bool) -> list[NDArray[np.float32]]:
        """Logits of all tokens, or of the last one only, of a sequence from an empty cache."""
        if len(tokens) > self._capacity:
            self._make_room(len(tokens))
        self._library.llama_kv_cache_clear(self._context)
        self._tokens = list(tokens)
        rows: list[NDArray[np.float32]] = []
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            last = start + len(part) == len(tokens)
            self._decode(part, start, every=every, last=last)
            wanted = range(len(part)) if every else [len(part) - 1] if last else []
            rows += [self._row(index) for index in wanted]
        return rows

    def _make_room(self, length: int) -> None:
        """A new context for `length` tokens and some more; what the old one held is lost."""
        capacity = max(SMALLEST_CONTEXT, 1 << (length + MARGIN - 1).bit_length())
        if self._context:
            self._library.llama_free(self._context)
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ResourceError(
                f"ik_llama.cpp has no room for a context of {capacity} tokens.",
                hint="Close other programs, or give fewer tokens.",
            )
        self._capacity = capacity

    def _decode(self, tokens: Sequence[int], position: int, *, every: bool, last: bool) -> None:
        """Run up to `BATCH` tokens; logits of all, of the last one, or of none."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._ids[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._wanted[:count] = every
        self._wanted[count - 1] = every or last
        status = self._library.llama_decode(self._context, self._batch)
        if status != 0:
            raise LosaError(
                f"ik_llama.cpp could not compute {count} tokens at position {position} (status {status}).",
                hint="Leave this peer out.",
            )

    def _row(self, index: int) -> NDArray[np.float32]:
        """Logits [vocab] of a token of the last batch."""
        row = self._library.llama_get_logits_ith(self._context, index)
        return np.array(np.ctypeslib.as_array(row, (self.vocab_size,)), np.float32)


def load_library(package: Path) -> ModuleType:
    """The package's low-level functions, started; `MissingError` if they are not those of `TESTED`."""
    sys.path.insert(0, str(package))
    try:
        library = importlib.import_module(f"{MODULE}._ctypes_api")
    except (ImportError, OSError, AttributeError) as error:
        raise MissingError(
            f"{DISTRIBUTION} in {package} cannot be loaded: {error}.",
            hint=f"Install the tested version, {DISTRIBUTION}=={TESTED}.",
        ) from error
    finally:
        sys.path.remove(str(package))
    library.llama_backend_init()
    return library


def main(arguments: list[str] | None = None) -> int:
    """The command line above; a `LosaError` is JSON on stderr, and its exit code."""
    parser = argparse.ArgumentParser(prog="losa_deploy.benchmarks.ik.worker", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--probe", type=int, nargs=2, metavar=("PROMPT", "DECODE"))
    options = parser.parse_args(arguments)
    return answer(lambda: IkModel(options.package, options.model, options.threads), options.probe)


if __name__ == "__main__":
    sys.exit(main())
