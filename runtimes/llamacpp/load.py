"""Models out of GGUF files: with llama.cpp's own kernels, or with ours."""

from __future__ import annotations

from pathlib import Path

from losa_deploy.bindings.llama_cpp import load, logged_errors, refusal
from losa_deploy.errors import InputError, MissingError
from losa_deploy.gguf.check import check_gguf
from losa_deploy.gguf.view import standard_view

from .backend import Backend
from .session import Model


def load_file(path: Path, *, float_cache: bool, mapped: bool = True) -> Model:
    """Load a file as llama.cpp does; `InputError` if it refuses, or would end the process over the file."""
    check_gguf(path)
    library = load()
    parameters = library.llama_model_default_params()
    parameters.n_gpu_layers = 0
    if not mapped:
        parameters.load_mode = library.LLAMA_LOAD_MODE_NONE
    with logged_errors() as lines:
        handle = library.llama_model_load_from_file(str(path).encode(), parameters)
    if not handle:
        raise refusal(path, lines)
    return Model(library, handle, float_cache)


def load_packed(path: Path, backend: Backend, *, float_cache: bool) -> Model:
    """Show llama.cpp the standard view of a packed file, whose weights the plug-in takes as they are.

    Raises `MissingError` without the plug-in or if llama.cpp does not ask it for its weights, `InputError` if
    the file is damaged.
    """
    library, plugin = load(), backend.plugin
    if plugin is None:
        raise MissingError(
            f"{path} is packed, and our backend cannot be used: {backend.reason.rstrip('.')}.",
            hint="Use the portable file of the same export (`export --format gguf --portable`).",
        )
    view = standard_view(path)
    parameters = library.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.load_mode = library.LLAMA_LOAD_MODE_NONE
    pieces = [(piece.at, piece.offset, piece.bytes) for piece in view.pieces]
    before = plugin.statistics().tensors
    file = plugin.virtual_open(path, view.header, pieces, view.total_bytes)
    try:
        with backend.accepting(True), logged_errors() as lines:
            handle = library.llama_model_load_from_file_ptr(file, parameters)
    finally:
        plugin.virtual_close(file)
    if not handle:
        raise refusal(path, lines)
    model = Model(library, handle, float_cache)
    if damage := plugin.damage():
        model.free()
        raise InputError(
            f"{path} is damaged: {damage}.", hint="Copy the file again, or export the model again."
        )
    if (taken := plugin.statistics().tensors - before) < view.blobs:
        model.free()
        raise MissingError(
            f"llama.cpp left {view.blobs - taken} of {view.blobs} packed weights of {path} to itself, "
            "which cannot read them.",
            hint="Set LOSA_GGML=b, or use the portable file of the same export.",
        )
    return model
