"""llama.cpp as it is, with our backend, and without any rounding."""

from __future__ import annotations

import tempfile
from pathlib import Path

from losa_deploy.gguf.view import is_packed, write_expanded

from ..facts import thread_count
from .backend import attach
from .files import choose_file, has_float_weights, holds_gguf
from .load import load_file, load_packed
from .parallel import LlamaCppSlots
from .session import LlamaCppSession, Model


class StockLlamaCppRuntime:
    """Opens GGUF files as anyone with llama-cpp-python does; refuses packed ones."""

    name = "llamacpp-stock"

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

    def exact(self) -> ExpandedLlamaCppRuntime:
        """The weights as f32: llama.cpp's own kernels round activations to int8 or f16."""
        return ExpandedLlamaCppRuntime()

    def baseline(self) -> StockLlamaCppRuntime:
        """Itself."""
        return self

    def open(self, folder: Path, *, threads: int) -> LlamaCppSession:
        """Load a file, or the portable file of a folder; `threads` 0 means the physical cores.

        Raises `InputError` with llama.cpp's reason if it cannot open the file.
        """
        return LlamaCppSession(self._load(folder), thread_count(threads))

    def open_slots(self, folder: Path, *, threads: int, slots: int, context: int) -> LlamaCppSlots:
        """Load the same file for several sequences at once."""
        return LlamaCppSlots(self._load(folder), threads=thread_count(threads), slots=slots, context=context)

    def _load(self, folder: Path) -> Model:
        path = choose_file(folder, packed=False)
        # Even here, because route a can be taken before the first model only.
        with attach().accepting(False):
            return load_file(path, float_cache=has_float_weights(path))


class ExpandedLlamaCppRuntime:
    """What the bytes of our files mean, computed in f32: expanded into a temporary file, f32 cache."""

    name = "llamacpp-f32"

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

    def exact(self) -> ExpandedLlamaCppRuntime:
        """Itself."""
        return self

    def baseline(self) -> ExpandedLlamaCppRuntime:
        """Itself."""
        return self

    def open(self, folder: Path, *, threads: int) -> LlamaCppSession:
        """Expand the packed file of a folder, else the portable one, and load the result.

        Raises `ResourceError` if the disk has no room for it, `InputError` for files that are not ours.
        """
        path = choose_file(folder, packed=True)
        with tempfile.TemporaryDirectory(prefix="losa-gguf-", ignore_cleanup_errors=True) as name:
            plain = Path(name) / path.name
            write_expanded(path, plain)
            with attach().accepting(False):
                model = load_file(plain, float_cache=True, mapped=False)
        return LlamaCppSession(model, thread_count(threads))


class LlamaCppRuntime:
    """Opens GGUF files with our backend in llama.cpp, which keeps sparse weights without their zeros."""

    name = "llamacpp"

    def __init__(self) -> None:
        self.fallback = ""
        """Why our backend could not be used for the last opened file; empty if it was."""

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

    def exact(self) -> ExpandedLlamaCppRuntime:
        """The weights as f32: our kernels round activations to int8 where the weights are integers."""
        return ExpandedLlamaCppRuntime()

    def baseline(self) -> StockLlamaCppRuntime:
        """llama.cpp as it is."""
        return StockLlamaCppRuntime()

    def open(self, folder: Path, *, threads: int) -> LlamaCppSession:
        """Load a file, or the packed file of a folder, else its portable one.

        Where our backend cannot be used, a portable file runs in llama.cpp's own kernels and
        `fallback` says why; a packed one is a `MissingError` with that reason.
        """
        return LlamaCppSession(self._load(folder), thread_count(threads))

    def open_slots(self, folder: Path, *, threads: int, slots: int, context: int) -> LlamaCppSlots:
        """Load the same file for several sequences at once."""
        return LlamaCppSlots(self._load(folder), threads=thread_count(threads), slots=slots, context=context)

    def _load(self, folder: Path) -> Model:
        path = choose_file(folder, packed=True)
        backend = attach()
        self.fallback = backend.reason
        float_cache = has_float_weights(path)
        if is_packed(path):
            return load_packed(path, backend, float_cache=float_cache)
        with backend.accepting(True):
            # Not mapped: the pages of weights that were packed would count as this process's memory.
            return load_file(path, float_cache=float_cache, mapped=bool(backend.reason))
