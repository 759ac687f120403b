"""Ways to run a packed tensor in the kernels: in this process, or in a build that Python cannot load."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackedTensor
from losa_deploy.layouts.base import COMPONENTS
from losa_deploy.layouts.blob import scale_type_id, to_blob

ROOT = Path(__file__).resolve().parents[2]
Matrix = NDArray[np.float32]
Multiply = Callable[[PackedTensor, Matrix, int], Matrix]
"""(weight, x [tokens, in], rows at a time) → x @ W.T."""


def open_tensor(packed: PackedTensor) -> _native.Tensor:
    """The tensor as the kernels see it; raises `RuntimeError` if its bytes break the format."""
    parts = [packed.arrays.get(name, np.zeros(0, np.uint8)) for name in COMPONENTS]
    return _native.Tensor(
        LAYOUTS[packed.layout].number,
        VALUE_TYPES[packed.value_type].number,
        *packed.shape,
        scale_type_id(packed),
        packed.params.get("n", 0),
        packed.params.get("m", 0),
        packed.params.get("position_bits", 0),
        packed.params.get("group_size", 0),
        *(np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts),
    )


def build(target: str, folder: Path, *options: str) -> Path:
    """Configure and build a program of native/tests; returns its path."""
    tool = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = [tool, "-S", str(ROOT), "-B", str(folder), *options]
    for command in (configure, [tool, "--build", str(folder), "--target", target, "-j", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / target


def cmake(folder: Path, *options: str) -> Path:
    """Build `run_cases`."""
    return build("run_cases", folder, "-DLOSA_BUILD_TESTS=ON", *options)


@dataclass(frozen=True)
class Program:
    """A build of `native/tests/run_cases.cpp` and one of its targets."""

    command: tuple[str, ...]
    target: str
    folder: Path

    def run(self, blob: bytes, x: Matrix, step: int) -> tuple[int, NDArray[np.float32]]:
        """Status and y, flat; fails if the program itself does (a sanitizer's report is shown)."""
        cases, results = self.folder / "cases", self.folder / "results"
        head = struct.pack("<QQQQ", len(blob), x.nbytes, len(x), step)
        cases.write_bytes(head + blob + x.tobytes())
        command = [*self.command, self.target, str(cases), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        data = results.read_bytes()
        status, size = struct.unpack_from("<QQ", data)
        assert len(data) == 16 + size
        return status, np.frombuffer(data, np.float32, offset=16)

    def multiply(self, packed: PackedTensor, x: Matrix, step: int) -> Matrix:
        status, y = self.run(to_blob(packed), x, step)
        assert status == 0
        return y.reshape(len(x), packed.shape[0])


@pytest.fixture(scope="session")
def build_run_cases() -> Callable[..., Path]:
    """(build folder, CMake options …) → program."""
    return cmake


@pytest.fixture(scope="session")
def build_program() -> Callable[..., Path]:
    """(program, build folder, CMake options …) → program."""
    return build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_cases with the AVX-512 targets in plain C++."""
    return cmake(tmp_path_factory.mktemp("emulated"), "-DLOSA_EMULATE_AVX512=ON")


@pytest.fixture(scope="session")
def arm(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """run_cases for 64-bit ARM, and the emulator that runs it."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    program = cmake(
        tmp_path_factory.mktemp("arm"),
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    return (emulator, "-cpu", "max", str(program))


def ways() -> list[object]:
    """In-process targets, then those that need a build of their own."""
    slow = [
        pytest.param(name, marks=pytest.mark.slow) for name in ("emulated avx512f", "emulated avx512vnni")
    ]
    return [*_native.targets(), *slow, pytest.param("arm neon", marks=pytest.mark.slow)]


@pytest.fixture(params=ways())
def multiply(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Multiply]:
    """Multiplication in each target in turn."""
    build, _, target = request.param.rpartition(" ")
    if build:
        found = request.getfixturevalue(build)
        command = found if isinstance(found, tuple) else (str(found),)
        yield Program(command, target, tmp_path).multiply
        return
    _native.set_target(target)
    yield lambda packed, x, step: open_tensor(packed).matmul(x, step)
    _native.set_target("")
