"""The sparse backend for ggml: where the plug-in is, and what it does in a process that runs llama.cpp."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from losa_deploy.bindings.libraries import packaged_library
from losa_deploy.errors import InputError, MissingError

TESTED = ("0.25.1", "0.25.3")
"""Versions of ggml whose structures the plug-in declares and was tested with; the same list is in it."""
ROUTES = ("a", "b", "off")
"""Values of the environment variable LOSA_GGML."""


class _Counts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("tensors", "packed", "dense", "dense_bytes", "packed_bytes", "pack_nanoseconds")
    ]


class _Piece(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("at", "offset", "bytes")]


@dataclass(frozen=True)
class Statistics:
    """What the plug-in did with weights since it was loaded; those of freed models stay counted."""

    tensors: int
    """Weights it was handed: `packed` + `dense`."""
    packed: int
    dense: int
    """Kept without a mask, because packing would not have made them smaller."""
    dense_bytes: int
    """Bytes of all of them in llama.cpp's types for such values."""
    packed_bytes: int
    """Bytes of all of them in memory."""
    pack_nanoseconds: int
    """Time spent in it, by the clock on the wall."""


def library_name(platform: str = sys.platform) -> str:
    """File name of the plug-in on a platform, named as in `sys.platform`."""
    return "libggml-losa.dylib" if platform == "darwin" else "libggml-losa.so"


def plugin_path() -> Path:
    """The plug-in inside the installed package; `MissingError` if it is not there."""
    return packaged_library(library_name(), "sparse backend for ggml")


class Plugin:
    """The plug-in in this process. There is one, however often it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = _declare(_open(path))

    def use(self, ggml_library: ctypes.CDLL) -> None:
        """Look up ggml in this library and in what it depends on, instead of in any that is loaded."""
        self._library.losa_ggml_library(ggml_library._handle)

    def start(self) -> None:
        """Install the route that LOSA_GGML names, or the first that works; call it before the first model.

        With LOSA_GGML=off nothing is installed, and that is no error. Raises `MissingError` with the
        reason if it cannot be: no ggml in this process, another version of it, or a route it has not.
        """
        if self._library.losa_ggml_start() != 0:
            raise MissingError(
                f"The sparse backend cannot be used here: {self.status}.",
                hint=f"It runs with ggml {' and '.join(TESTED)}: `pip install 'losa-deploy[llamacpp]'`.",
            )

    @property
    def status(self) -> str:
        """One line: the route and the version of ggml, or why there is none."""
        return _text(self._library.losa_ggml_status())

    @property
    def route(self) -> str:
        """`a`, `b` or `off`."""
        return _text(self._library.losa_ggml_route())

    def accept(self, on: bool) -> None:
        """Whether weights loaded from now on come to the plug-in, or stay with stock llama.cpp."""
        self._library.losa_ggml_accept(int(on))

    def damage(self) -> str:
        """What was wrong with the first damaged packed weight since the last call; empty if nothing was.

        A model with such a weight loads, because ggml lets no backend refuse one, and computes NaN.
        """
        return _text(self._library.losa_ggml_damage())

    def statistics(self) -> Statistics:
        """Counts since the plug-in was loaded."""
        counts = _Counts()
        self._library.losa_ggml_statistics(ctypes.byref(counts))
        return Statistics(**{field.name: int(getattr(counts, field.name)) for field in fields(Statistics)})

    def virtual_open(
        self, path: Path, header: bytes, pieces: Sequence[tuple[int, int, int]], total_bytes: int
    ) -> int:
        """Address of a `FILE *` of `total_bytes` that shows `header`, then `pieces` of the file at `path`.

        A piece is its position in the virtual file, its position in the real one, and its bytes; they
        ascend and do not overlap; what lies between them reads as zero. Of a piece that is a packed weight
        only the header is shown, which tells the plug-in where the rest is. Raises `InputError` if the real
        file cannot be opened or a piece lies outside of it. Close it with `virtual_close`.
        """
        array = (_Piece * max(1, len(pieces)))(*(_Piece(*piece) for piece in pieces))
        address = self._library.losa_ggml_virtual_open(
            os.fsencode(path), header, len(header), array, len(pieces), total_bytes
        )
        if not address:
            reason = os.strerror(ctypes.get_errno())
            raise InputError(f"{path} cannot be read: {reason}.", hint="Export or download it again.")
        return int(address)

    def virtual_close(self, file: int) -> None:
        """Close what `virtual_open` gave; after the model is loaded, nothing reads it any more."""
        self._library.losa_ggml_virtual_close(file)


def load_plugin(ggml_library: ctypes.CDLL | None = None) -> Plugin:
    """Load the plug-in into this process; installs nothing yet (`Plugin.start` does).

    `ggml_library`: the libggml (or libllama) that runs the models, for processes that hold several
    copies. Without it, the one that the loaded libllama depends on. Raises `MissingError`.
    """
    plugin = Plugin(plugin_path())
    if ggml_library is not None:
        plugin.use(ggml_library)
    return plugin


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path), use_errno=True)
    except OSError as error:
        raise MissingError(
            f"The sparse backend {path} cannot be loaded: {error}.",
            hint="Install it again with `pip install --force-reinstall --no-deps losa-deploy`.",
        ) from error


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The functions of native/ggml/plugin.h."""
    size, pointer = ctypes.c_uint64, ctypes.c_void_p
    text = ctypes.c_char_p
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "losa_ggml_library": (None, [pointer]),
        "losa_ggml_start": (ctypes.c_int, []),
        "losa_ggml_status": (text, []),
        "losa_ggml_route": (text, []),
        "losa_ggml_damage": (text, []),
        "losa_ggml_accept": (None, [ctypes.c_int]),
        "losa_ggml_statistics": (None, [pointer]),
        "losa_ggml_virtual_open": (pointer, [text, text, size, pointer, size, size]),
        "losa_ggml_virtual_close": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
