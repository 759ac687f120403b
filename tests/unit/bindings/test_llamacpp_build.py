"""Builds of llama-cpp-python that crash on CPUs with AMX."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from losa_deploy.bindings.llama_cpp import _check_amx, unsound_compiler
from losa_deploy.errors import MissingError

DEBIAN_12 = b"\x00GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\x00"
UBUNTU_24 = b"\x00GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0\x00"


@pytest.mark.parametrize(
    ("comment", "version"),
    [
        (DEBIAN_12, "12.2"),
        (b"GCC: (GNU) 13.2.1 20231011", "13.2"),
        (UBUNTU_24, ""),
        (DEBIAN_12 + b"GCC: (GNU) 14.2.0", ""),  # the C runtime's own files are older than the compiler
        (DEBIAN_12 + b"clang version 18.1.3", ""),
        (b"Apple clang version 16.0.0", ""),
        (b"", ""),
    ],
)
def test_the_compiler_is_read_from_the_library(comment: bytes, version: str) -> None:
    assert unsound_compiler(b"\x7fELF" + comment + b"\x00") == version


def built(folder: Path, info: str, comment: bytes) -> ModuleType:
    (folder / "lib").mkdir()
    (folder / "lib" / "libggml-cpu.so.0").write_bytes(comment)
    library = ModuleType("llama_cpp")
    library.__file__ = str(folder / "llama_cpp.py")
    library.llama_print_system_info = lambda: info.encode()  # type: ignore[attr-defined]
    return library


def test_a_build_that_would_crash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"GCC 12\.2.*CFLAGS=-mno-amx-int8.*llama-cpp-python=="):
        _check_amx(built(tmp_path, "CPU : AVX512 = 1 | AMX_INT8 = 1 | OPENMP = 1 | ", DEBIAN_12))


@pytest.mark.parametrize(
    ("info", "comment"),
    [("CPU : AVX512 = 1 | OPENMP = 1 | ", DEBIAN_12), ("CPU : AMX_INT8 = 1 | ", UBUNTU_24)],
)
def test_other_builds_are_taken(tmp_path: Path, info: str, comment: bytes) -> None:
    _check_amx(built(tmp_path, info, comment))
