"""llama.cpp as it is, with our backend, and without any rounding."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from losa_deploy.bindings.llama_cpp import load, version
from losa_deploy.errors import MissingError
from losa_deploy.gguf.view import is_packed, write_expanded
from losa_deploy.interfaces import Runtime

from ..facts import thread_count
from .backend import attach
from .files import choose_file, has_float_weights, holds_gguf
from .load import load_file, load_packed
from .parallel import LlamaCppSlots
from .session import LlamaCppSession, Model

OPENS = "a GGUF file, or a folder with one"


class StockLlamaCppRuntime(Runtime):
    """Opens GGUF files as anyone with llama-cpp-python does; refuses packed ones."""

    name = "llamacpp-stock"
    opens = OPENS
    preference = -1

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

    def exact(self) -> ExpandedLlamaCppRuntime:
        """The weights as f32: llama.cpp's own kernels round activations to int8 or f16."""
        return ExpandedLlamaCppRuntime()

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


class ExpandedLlamaCppRuntime(Runtime):
    """What the bytes of our files mean, computed in f32: expanded into a temporary file, f32 cache."""

    name = "llamacpp-f32"
    opens = OPENS
    preference = -1

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

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


class LlamaCppRuntime(Runtime):
    """Opens GGUF files with our backend in llama.cpp, which keeps sparse weights without their zeros."""

    name = "llamacpp"
    opens = OPENS
    preference = 10
    packs_at_load = True

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return holds_gguf(folder)

    def exact(self) -> ExpandedLlamaCppRuntime:
        """The weights as f32: our kernels round activations to int8 where the weights are integers."""
        return ExpandedLlamaCppRuntime()

    def baseline(self) -> StockLlamaCppRuntime:
        """llama.cpp as it is."""
        return StockLlamaCppRuntime()

    def require(self, *, packed: bool) -> None:
        """llama-cpp-python, and for packed files our backend in it."""
        load()
        backend = attach()
        if packed and backend.reason:
            raise MissingError(
                f"A packed GGUF cannot be checked here, because our backend cannot be used: {backend.reason}",
                hint="Leave --packed out, or see `losa-deploy doctor`.",
            )

    def facts(self) -> Mapping[str, str]:
        """Version of llama-cpp-python, and how our backend runs in it or why it cannot."""
        try:
            backend = attach()
            state = backend.plugin.status if backend.plugin else f"not usable: {backend.reason}"
        except MissingError as error:
            state = f"not usable: {error}"
        return {"llama_cpp_python": version() or "not installed", "ggml_backend": state}

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
