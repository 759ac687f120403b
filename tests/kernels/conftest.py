"""Ways to run a packed tensor in the kernels: in this process, or in a build that Python cannot load."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackedTensor
from losa_deploy.layouts.base import COMPONENTS
from losa_deploy.layouts.blob import header_numbers, scale_type_id, to_blob

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g"
QUICKLY = ("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -fno-inline -DNDEBUG",)
"""The products are the same, and what a test runs for seconds does not take minutes to compile: with
functions inlined, every kernel is compiled with the loops of all intrinsics that are emulated."""
Matrix = NDArray[np.float32]
Case = tuple[PackedTensor, Matrix, int]
"""Weight, x [tokens, in], rows at a time."""
MultiplyAll = Callable[[Sequence[Case]], list[Matrix]]
"""Cases → x @ W.T of each."""
Bytes = tuple[bytes, Matrix, int]
"""A case whose weight is a blob, sound or not."""
Answer = tuple[int, NDArray[np.float32]]
"""Status and y, flat."""
RunCases = Callable[[Sequence[str], str, Sequence[Bytes]], list[Answer]]
"""(command of a build of `run_cases`, target, cases) → the answer to each."""


def opened(packed: PackedTensor) -> _native.Tensor:
    """The tensor as the kernels see it; raises `RuntimeError` if its bytes break the format."""
    parts = [packed.arrays.get(name, np.zeros(0, np.uint8)) for name in COMPONENTS]
    return _native.Tensor(
        LAYOUTS[packed.layout].number,
        VALUE_TYPES[packed.value_type].number,
        *packed.shape,
        scale_type_id(packed),
        *header_numbers(packed.params),
        *(np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts),
    )


def build(target: str, name: str, *options: str) -> Path:
    """Configure and build a program of tests/native in build/tests/NAME, where later runs find what they can
    use; returns its path.
    """
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    tool = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = [tool, "-S", str(ROOT), "-B", str(folder), "-DLOSA_BUILD_TESTS=ON", *QUICKLY, *options]
    with FileLock(folder.with_suffix(".lock")):  # of workers of pytest-xdist one builds
        for command in (configure, [tool, "--build", str(folder), "--target", target, "-j", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / target


def build_sanitized(target: str) -> Path:
    """A program with sanitizers (address, undefined behaviour), and instructions of other CPUs in plain C++.

    With clang its objects are also those of the fuzzer.
    """
    clang = shutil.which("clang++")
    if clang is not None:
        options = (f"-DCMAKE_CXX_COMPILER={clang}", "-DLOSA_BUILD_FUZZER=ON")
        return build(target, "sanitized-clang", "-DLOSA_EMULATE=ON", *options)
    flags = f"-DCMAKE_CXX_FLAGS_RELEASE={SANITIZERS}"
    return build(target, "sanitized", "-DLOSA_EMULATE=ON", flags)


def parsed(data: bytes) -> list[Answer]:
    """What `run_cases` wrote, as far as it came."""
    found, at = [], 0
    while at < len(data):
        status, size = struct.unpack_from("<QQ", data, at)
        found.append((status, np.frombuffer(data, np.float32, size // 4, at + 16)))
        at += 16 + size
    return found


def run_in(folder: Path, command: Sequence[str], target: str, cases: Sequence[Bytes]) -> list[Answer]:
    """The answers of one process; fails, with what it said, if the process does (or a sanitizer in it)."""
    with (folder / "cases").open("wb") as file:
        for blob, x, step in cases:
            file.write(struct.pack("<QQQQ", len(blob), x.nbytes, len(x), step) + blob + x.tobytes())
    arguments = [*command, target, str(folder / "cases"), str(folder / "results")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    found = parsed((folder / "results").read_bytes())
    assert done.returncode == 0, f"{target}, case {len(found)} of {len(cases)}: {done.stderr[:3000]}"
    assert len(found) == len(cases)
    return found


@pytest.fixture
def run_cases(tmp_path: Path) -> RunCases:
    """A function that runs many cases in one process of a build of `tests/native/run_cases.cpp`."""
    return lambda command, target, cases: run_in(tmp_path, command, target, cases)


@pytest.fixture(scope="session")
def open_tensor() -> Callable[[PackedTensor], _native.Tensor]:
    """A function that hands a packed tensor to the kernels; it raises `RuntimeError` for damage."""
    return opened


@pytest.fixture(scope="session")
def sanitized() -> Callable[[str], Path]:
    """A function: program of tests/native → a build of it with sanitizers."""
    return build_sanitized


@pytest.fixture(scope="session")
def emulated() -> Path:
    """run_cases with the targets of AVX-VNNI and AVX-512 in plain C++."""
    return build("run_cases", "emulated", "-DLOSA_EMULATE=ON")


@pytest.fixture(scope="session")
def arm() -> tuple[str, ...]:
    """run_cases for 64-bit ARM, and the emulator that runs it."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    program = build(
        "run_cases",
        "arm",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    return (emulator, "-cpu", "max", str(program))


def ways() -> list[object]:
    """In-process targets, then those that need a build of their own."""
    elsewhere = ("emulated avxvnni", "emulated avx512f", "emulated avx512vnni", "arm neon")
    return [*_native.targets(), *(pytest.param(name, marks=pytest.mark.slow) for name in elsewhere)]


@pytest.fixture(params=ways())
def multiply_all(request: pytest.FixtureRequest, run_cases: RunCases) -> Iterator[MultiplyAll]:
    """Multiplication in each target in turn; one process for all cases where it needs one."""
    build, _, target = request.param.rpartition(" ")
    if build:
        found = request.getfixturevalue(build)
        command = found if isinstance(found, tuple) else (str(found),)

        def elsewhere(cases: Sequence[Case]) -> list[Matrix]:
            answers = run_cases(command, target, [(to_blob(packed), x, step) for packed, x, step in cases])
            assert [status for status, _ in answers] == [0] * len(cases)
            return [
                y.reshape(len(x), packed.shape[0])
                for (_, y), (packed, x, _) in zip(answers, cases, strict=True)
            ]

        yield elsewhere
        return
    _native.set_target(target)
    yield lambda cases: [opened(packed).matmul(x, step) for packed, x, step in cases]
    _native.set_target("")
