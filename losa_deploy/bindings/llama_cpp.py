"""llama.cpp through llama-cpp-python's low-level functions, with its log kept off the terminal.

In the core because two parts need it: the runtime, and the tokenizer of a GGUF file. The package is
imported when it is first used.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from losa_deploy.errors import InputError, MissingError
from losa_deploy.gguf.names import PACKED

ERROR, CONTINUED = 4, 5
"""Levels of llama.cpp's log: errors, and the rest of the line before."""
DAMAGE = ("not within the file bounds", "failed to read", "magic", "corrupted", "read past the end")
"""Words in llama.cpp's reasons that mean a file was cut or changed on its way here."""
SOUND_AMX = (13, 3)
"""The GCC from which on `_tile_loadconfig` reads its whole argument. Before, only 8 of its 64 bytes are
sure to reach the CPU, and llama.cpp's AMX products end in a segmentation fault (seen with 12.2)."""
_lock = threading.RLock()
_keep: list[object] = []
"""The log callback: llama.cpp holds only its address."""
_errors: deque[str] = deque(maxlen=100)


def load() -> ModuleType:
    """The module `llama_cpp.llama_cpp`, started and silenced; `MissingError` if it cannot be used."""
    with _lock:
        library = load_package()
        if not _keep:
            _silence(library)
            library.llama_backend_init()
        return library


def load_package() -> ModuleType:
    """The module `llama_cpp.llama_cpp` as it is when imported; `MissingError` if it cannot be."""
    try:
        from llama_cpp import llama_cpp as library
    except ImportError as error:
        raise _missing("is not installed" if error.name == "llama_cpp" else str(error)) from None
    except (OSError, RuntimeError) as error:
        raise _missing(f"cannot be loaded: {error}") from error
    _check_amx(library)
    return library


@cache
def _check_amx(library: ModuleType) -> None:
    """`MissingError` if this build would crash in its first product."""
    if "AMX_INT8 = 1" not in library.llama_print_system_info().decode():
        return
    for path in sorted((Path(library.__file__ or "").parent / "lib").glob("libggml-cpu.so*")):
        if compiler := unsound_compiler(path.read_bytes()):
            raise MissingError(
                f"llama-cpp-python was compiled for AMX by GCC {compiler}, which makes it crash on this CPU.",
                hint="Run `CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8 pip install --force-reinstall "
                f"--no-deps --no-cache-dir llama-cpp-python=={version()}`.",
            )


def unsound_compiler(binary: bytes) -> str:
    """Version of the GCC that made a shared library, if it is older than `SOUND_AMX`, else ""."""
    found = re.findall(rb"GCC: \([^)]*\) (\d+)\.(\d+)", binary)
    newest = max(((int(major), int(minor)) for major, minor in found), default=SOUND_AMX)
    if newest >= SOUND_AMX or b"clang version" in binary:
        return ""
    return ".".join(map(str, newest))


def version() -> str:
    """Version of llama-cpp-python, "" if it is not installed; imports nothing."""
    from importlib import metadata

    try:
        return metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def logged_errors() -> Iterator[list[str]]:
    """What llama.cpp logs as errors in the block, line by line; filled when the block ends.

    One block at a time: the log is one per process.
    """
    lines: list[str] = []
    with _lock:
        _errors.clear()
        try:
            yield lines
        finally:
            lines += [line for line in "".join(_errors).splitlines() if line.strip()]


def refusal(path: Path, lines: list[str]) -> InputError:
    """The error about a file that llama.cpp did not open, with the reason that it logged."""
    marker = "error loading model: "
    told = [line.split(marker, 1)[1] for line in lines if marker in line]
    # The loader repeats the path; what is wrong with the file was said before, by the part that reads it.
    told = [reason for reason in told if "failed to load model from" not in reason]
    told += [line.split(": ", 1)[-1] for line in lines if marker not in line]
    reason = (told or ["it gave no reason"])[0].strip(" .\n")
    hint = "Copy or download the file again." if any(word in " ".join(lines) for word in DAMAGE) else ""
    if "unknown model architecture" in reason:
        hint = "Update it with `pip install --upgrade llama-cpp-python`, or export the model to ONNX."
    if f"'{PACKED}'" in reason:
        reason = f"{reason} (the file is packed, which only our backend can run)"
        hint = "Use --runtime llamacpp, or the portable file of the same export."
    return InputError(
        f"llama.cpp cannot open {path}: {reason}.",
        hint=hint or "Check that the file is a complete GGUF model of a family that llama.cpp knows.",
    )


def _silence(library: ModuleType) -> None:
    """Keep the last errors and drop the rest of the log."""
    last = [0]

    def receive(level: int, text: bytes, data: object) -> None:
        if level != CONTINUED:
            last[0] = level
        if last[0] == ERROR and text:
            _errors.append(text.decode("utf-8", "replace"))

    callback = library.llama_log_callback(receive)
    _keep.append(callback)
    library.llama_log_set(callback, ctypes.c_void_p(0))


def _missing(what: str) -> MissingError:
    return MissingError(
        f"GGUF models need llama-cpp-python, which {what}.",
        hint='Run `pip install "losa-deploy[llamacpp]"`.',
    )
