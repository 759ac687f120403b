"""Which file of a folder is opened, and what is in it."""

from __future__ import annotations

from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.gguf.file import open_gguf
from losa_deploy.gguf.names import LINEARS, PREFIX
from losa_deploy.gguf.types import F32
from losa_deploy.gguf.view import blob_header, is_packed

SUFFIX = ".gguf"
PROJECTIONS = tuple(f".{part}.weight" for part in LINEARS.values())


def holds_gguf(path: Path) -> bool:
    """True for a GGUF file, or a folder with one; looks at names only."""
    return (path.suffix == SUFFIX and path.is_file()) or any(_files(path))


def choose_file(path: Path, *, packed: bool) -> Path:
    """`path` itself if it is a file; in a folder the packed file (if `packed`), else the only portable one.

    Raises `InputError` if there is none, or several to choose from.
    """
    if path.is_file():
        return path
    files = _files(path)
    if not files:
        what = "holds no GGUF file" if path.is_dir() else "does not exist"
        raise InputError(
            f"{path} {what}.", hint="Give a .gguf file or a folder written by `export --format gguf`."
        )
    kinds = {file: is_packed(file) for file in files} if len(files) > 1 else {files[0]: packed}
    wanted = [file for file, kind in kinds.items() if kind] if packed else []
    found = wanted or [file for file, kind in kinds.items() if not kind] or list(files)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{path} holds several GGUF models: {names}.", hint="Give the path of one of them.")
    return found[0]


def has_float_weights(path: Path) -> bool:
    """True if the linears of the first block are F32; False also for files with types we do not write."""
    try:
        with open_gguf(path) as file:
            for tensor in file.tensors:
                if tensor.name.endswith(PROJECTIONS):
                    if tensor.name.startswith(PREFIX):
                        return blob_header(file, tensor).value_type == "f32"
                    return tensor.type == F32
    except InputError:
        pass
    return False


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob(f"*{SUFFIX}"))) if folder.is_dir() else ()
