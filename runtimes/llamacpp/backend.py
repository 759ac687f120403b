"""Our plug-in inside of llama.cpp: put in once per process, before the first model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from losa_deploy.bindings.ggml import Plugin, load_plugin
from losa_deploy.bindings.llama_cpp import load, load_package
from losa_deploy.errors import MissingError

_loading = threading.RLock()
"""Which weights the plug-in takes is said once for the whole process, so models are loaded one by one."""


@dataclass(frozen=True)
class Backend:
    """What became of the plug-in in this process."""

    plugin: Plugin | None
    reason: str
    """Why it cannot be used; empty if it can."""

    @contextmanager
    def accepting(self, on: bool) -> Iterator[None]:
        """Weights of a model that is loaded in the block go to the plug-in, or stay with llama.cpp."""
        with _loading:
            if self.plugin is not None:
                self.plugin.accept(on)
            try:
                yield
            finally:
                if self.plugin is not None:
                    self.plugin.accept(True)


@cache
def attach() -> Backend:
    """Put the plug-in into llama.cpp, silenced, or say why that cannot be; the first call decides."""
    load()
    return _attach()


def enable() -> str:
    """Let `llama_cpp.Llama(...)` of this process run on our backend; returns one line that says how.

    Call it before the first model is loaded. Raises `MissingError` if the backend cannot be used here;
    with LOSA_GGML=off nothing changes. A packed file is opened by `LlamaCppRuntime` only.
    """
    backend = _attach()
    if backend.plugin is not None:
        return backend.plugin.status
    if backend.reason != _switched_off():
        raise MissingError(backend.reason, hint="Run `losa-deploy doctor` to see what is installed.")
    return backend.reason


@cache
def _attach() -> Backend:
    try:
        plugin = load_plugin(load_package()._lib)
        plugin.start()
    except MissingError as error:
        return Backend(None, error.message)
    if plugin.route == "off":
        return Backend(None, _switched_off())
    return Backend(plugin, "")


def _switched_off() -> str:
    return "LOSA_GGML=off switches our backend off."
