"""The native operators of domain `ai.losa`, as a library that ONNX Runtime loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.bindings.libraries import library_name, library_path
from losa_deploy.errors import MissingError

if TYPE_CHECKING:
    import onnxruntime as ort

LOADING_BYTES = 30.0
"""Per parameter while ONNX Runtime loads without the library: it keeps what decoders make on their way."""


def check_target() -> None:
    """Raise `MissingError` if LOSA_KERNELS asks for kernels that cannot run here."""
    from losa_deploy import _native

    if _native.target_name() == "none":
        raise MissingError(
            f"There are no such kernels here: {_native.target_reason()}.",
            hint=f"Set LOSA_KERNELS to one of {', '.join(_native.targets())}, or unset it.",
        )


def register(session_options: ort.SessionOptions) -> None:
    """Let sessions made with these options run `ai.losa` nodes by the native kernels.

    Raises `MissingError` if the library is not there, or if this ONNX Runtime cannot use it; the
    options are then as before, and the model's own functions run instead.
    """
    path = library_path()
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MissingError(
            f"ONNX Runtime cannot use the native operators in {path}: {reason}.",
            hint="Update it with `pip install --upgrade onnxruntime`.",
        ) from error


def refusal() -> str:
    """Why the native operators cannot be used here; empty if they can."""
    import onnxruntime as ort

    try:
        register(ort.SessionOptions())
    except MissingError as error:
        return str(error)
    return ""


def operators_state() -> str:
    """Path of the library with the native operators, or why they cannot be used here."""
    try:
        return refusal() or str(library_path())
    except (ImportError, MissingError) as error:
        return f"not usable: {error}"


@contextmanager
def folder_with_library(folder: Path) -> Iterator[Path]:
    """A temporary folder of links to the files of `folder`, and a copy of the library.

    onnxruntime-genai loads libraries from the model's own folder only, and follows links to find out;
    what a user exported is not ours to write to. Once a model is open, the folder is not needed.
    Raises `OSError` where there is no room or no right to make links.
    """
    with tempfile.TemporaryDirectory(prefix="losa-ort-", ignore_cleanup_errors=True) as name:
        for file in folder.iterdir():
            _link(file.resolve(), Path(name) / file.name)
        shutil.copyfile(library_path(), Path(name) / library_name())
        yield Path(name)


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # Windows asks for a privilege
        os.link(source, target)
