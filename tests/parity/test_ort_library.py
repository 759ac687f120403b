"""The library of operators: when it loads, when it is refused and why, and what runs without it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime as ort
import pytest

from losa_deploy.bindings.libraries import library_name, library_path
from losa_deploy.errors import MissingError
from losa_deploy.plugins import load_runtime
from losa_deploy.runtimes.ort import register
from losa_deploy.runtimes.ort.genai import GenaiRuntime
from losa_deploy.runtimes.ort.library import refusal
from losa_deploy.runtimes.ort.session import OrtRuntime, StockOrtRuntime


def test_registration_is_quick() -> None:
    times = []
    for _ in range(20):
        options = ort.SessionOptions()
        start = time.perf_counter()
        register(options)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_importing_the_package_does_not_import_onnxruntime() -> None:
    code = "import sys, losa_deploy.runtimes.ort as o; o.register; print('onnxruntime' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_library_names() -> None:
    names = [library_name(platform) for platform in ("linux", "darwin", "win32")]
    assert names == ["liblosa_ort.so", "liblosa_ort.dylib", "losa_ort.dll"]


def answer_to(version: bytes, *, table: bool = True, build: bytes = b"ORT Build Info: test") -> str:
    """What `RegisterCustomOps` tells an ONNX Runtime that has hardly more than its self-test asks for."""
    library = ctypes.CDLL(str(library_path()))
    library.RegisterCustomOps.restype = ctypes.c_void_p
    function, pointer = ctypes.CFUNCTYPE, ctypes.c_void_p
    texts = [ctypes.create_string_buffer(text) for text in (version, build)]  # a status is an index

    def create(code: int, text: bytes) -> int:
        texts.append(ctypes.create_string_buffer(text))
        return len(texts) - 1

    slots = {
        0: function(pointer, ctypes.c_int, ctypes.c_char_p)(create),
        1: function(ctypes.c_int, pointer)(lambda status: 2),
        2: function(pointer, pointer)(lambda status: ctypes.addressof(texts[status])),
        26: function(pointer, ctypes.c_char_p, pointer)(lambda name, domain: create(1, b"made " + name)),
        93: function(None, pointer)(lambda status: None),
        254: function(pointer)(lambda: ctypes.addressof(texts[1])),
    }
    entries = (pointer * 275)()
    for index, slot in slots.items():
        entries[index] = ctypes.cast(slot, pointer)
    address = ctypes.addressof(entries)
    get_api = function(pointer, ctypes.c_uint32)(lambda asked: address if table or asked == 1 else None)
    get_version = function(pointer)(lambda: ctypes.addressof(texts[0]))
    base = (pointer * 2)(ctypes.cast(get_api, pointer), ctypes.cast(get_version, pointer))
    status: int = library.RegisterCustomOps(None, base)
    return texts[status].value.decode()


def test_the_self_test_at_registration() -> None:
    assert answer_to(b"1.17.0") == "made ai.losa"
    assert answer_to(b"1.100.3+cu12") == "made ai.losa"
    for old in (b"1.16.3", b"2.0.0", b"trunk"):
        assert answer_to(old) == f"losa_ort needs ONNX Runtime 1.17 or a later 1.x, found {old.decode()}"
    for answer in (answer_to(b"1.99.0", table=False), answer_to(b"1.99.0", build=b"no")):
        assert "does not recognize the C interface of ONNX Runtime 1.99.0" in answer


def test_runtimes_with_and_without_the_library(tiny_dense_onnx: Path) -> None:
    for runtime in (OrtRuntime(), StockOrtRuntime(), GenaiRuntime(), GenaiRuntime(native=False)):
        runtime.open(tiny_dense_onnx, threads=1).close()
        assert runtime.fallback == ""
    assert load_runtime("ort").name == "ort"
    assert load_runtime("ort-stock").name == "ort-stock"


@pytest.mark.parametrize("kind", [OrtRuntime, GenaiRuntime])
def test_without_the_library_the_stock_operators_run(
    kind: type[OrtRuntime] | type[GenaiRuntime], tiny_dense_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losa_deploy.bindings.libraries.PACKAGE", "no_such_package")
    with pytest.raises(MissingError, match=r"liblosa_ort|losa_ort\.dll"):
        register(ort.SessionOptions())
    assert "pip install" in refusal()
    runtime = kind()
    runtime.open(tiny_dense_onnx, threads=1).close()
    assert library_name() in runtime.fallback


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / library_name()).write_bytes(b"not a library")
    monkeypatch.setattr("losa_deploy.runtimes.ort.library.library_path", lambda: tmp_path / library_name())
    assert "cannot use the native operators" in refusal()


def test_kernels_that_cannot_run_here_are_one_clear_error(tiny_dense_onnx: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from losa_deploy.errors import MissingError\n"
        "from losa_deploy.runtimes.ort.session import OrtRuntime\n"
        "try:\n    OrtRuntime().open(Path(sys.argv[1]), threads=1)\n"
        "except MissingError as error:\n    print(error.exit_code, error, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_dense_onnx)],
        env={**os.environ, "LOSA_KERNELS": "pentium"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("5 ") and "LOSA_KERNELS=pentium" in done.stdout and "scalar" in done.stdout
