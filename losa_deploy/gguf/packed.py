"""What marks a packed file as one: the keys, and how they are checked (docs/formats.md, "In GGUF")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losa_deploy.gguf.file import GgufFile, damaged
from losa_deploy.gguf.names import ARCHITECTURE, PACKED, PREFIX
from losa_deploy.layouts.blob import ALIGNMENT

if TYPE_CHECKING:
    from gguf import GGUFWriter

REAL = f"{PREFIX}architecture"
"""Key of the architecture that a packed file stands for."""
REQUIRED = f"{PREFIX}required"
VERSION = f"{PREFIX}format"
FORMAT = 1


def mark_packed(writer: GGUFWriter) -> None:
    """Give a file the architecture that stock tools refuse, and say which one it really has.

    Tensors are aligned so that kernels use them in place.
    """
    writer.kv_data[0][ARCHITECTURE].value = PACKED
    writer.add_string(REAL, writer.arch)
    writer.add_bool(REQUIRED, True)
    writer.add_uint32(VERSION, FORMAT)
    writer.add_custom_alignment(ALIGNMENT)


def real_architecture(file: GgufFile) -> str:
    """The architecture a packed file stands for; `InputError` if it is no packed file of this format."""
    found, version = file.text(ARCHITECTURE), file.number(VERSION)
    if found != PACKED:
        raise damaged(file.path, f"its architecture is {found!r}, that of a packed one {PACKED!r}")
    if version != FORMAT:
        raise damaged(file.path, f"its {VERSION} is {version}, this version reads {FORMAT}")
    real = file.text(REAL)
    if not real or real == PACKED:
        raise damaged(file.path, f"its {REAL} is {real!r}, expected e.g. 'llama'")
    return real
