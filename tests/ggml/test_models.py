"""Whole models in unmodified llama-cpp-python, with the plug-in on each route and without it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.ggml import load_plugin, plugin_path

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the plug-in is not built for Windows")

CHILD = Path(__file__).with_name("model_child.py")
WEIGHTS = 14
"""Block linears of the model."""
ROUNDING = {"F32": 1e-5, "F16": 2e-3, "Q8_0": 0.03, "Q4_0": 0.03}
"""Share of the logits' spread by which they may differ: f32 sums; stock rounds activations to f16, or to int8
in other groups than ours, half a step of 1/127 in each of 14 products."""


@dataclass(frozen=True)
class Outcome:
    facts: dict[str, Any]
    logits: NDArray[np.float32]


def run(model: Path, mode: str, folder: Path, **environment: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(model), "2", mode, str(folder / "logits.npy")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Outcome(json.loads(done.stdout.splitlines()[-1]), np.load(folder / "logits.npy"))


@pytest.mark.parametrize("kind", ROUNDING)
def test_routes_agree_with_stock(kind: str, write_model: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model(kind)
    stock = run(model, "stock", tmp_path)
    off = run(model, "start", tmp_path, LOSA_GGML="off")
    assert off.facts["route"] == "off"
    assert np.array_equal(off.logits, stock.logits)
    spread = float(stock.logits.std())
    for route in ("a", "b"):
        ours = run(model, "start", tmp_path, LOSA_GGML=route)
        assert ours.facts["route"] == route
        assert f"route {route} " in ours.facts["status"]
        assert ours.facts["statistics"]["packed"] == WEIGHTS
        error = float(np.abs(ours.logits[:600] - stock.logits[:600]).max())
        assert error <= ROUNDING[kind] * spread * 6, "six spreads: the largest logits"
        if kind == "F32":
            assert ours.facts["tokens"] == stock.facts["tokens"]


def test_a_file_of_the_type_that_views_declare_stays_with_stock(tmp_path: Path) -> None:
    import llama_cpp

    ggufs.build_peer(GEOMETRIES["tiny"], "f16", tmp_path / "tiny-f16", seed=0, threads=1)
    target = tmp_path / "q1_0.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q1_0
    source = str(tmp_path / "tiny-f16" / "model.gguf").encode()
    assert llama_cpp.llama_model_quantize(source, str(target).encode(), ctypes.byref(options)) == 0
    stock = run(target, "stock", tmp_path)
    for route in ("a", "b"):
        ours = run(target, "start", tmp_path, LOSA_GGML=route)
        assert ours.facts["statistics"]["tensors"] == 0
        assert ours.facts["tokens"] == stock.facts["tokens"]


def test_without_a_variable_the_first_route_is_taken(
    write_model: Callable[..., Path], tmp_path: Path
) -> None:
    environment = {"LOSA_GGML": ""}
    assert run(write_model("Q4_0"), "start", tmp_path, **environment).facts["route"] == "a"


def test_dense_models_are_right_too(write_model: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model("F16", kept=1.0)
    stock, ours = run(model, "stock", tmp_path), run(model, "start", tmp_path)
    assert ours.facts["statistics"]["dense"] == WEIGHTS
    assert float(np.abs(ours.logits[:600] - stock.logits[:600]).max()) <= 0.012 * float(stock.logits.std())


ACCEPT = """
import sys, llama_cpp
from losa_deploy.ggml import load_plugin, plugin_path
plugin = load_plugin()
plugin.start()
plugin.start()
plugin.accept(False)
stock = llama_cpp.Llama(sys.argv[1], verbose=False)
before = plugin.statistics().tensors
plugin.accept(True)
ours = llama_cpp.Llama(sys.argv[1], verbose=False)
for model in (ours, stock):
    model.eval([1, 2, 3])
sys.stdout.write(f"{before} {plugin.statistics().tensors}")
"""


def test_weights_stay_with_stock_while_none_are_accepted(write_model: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", ACCEPT, str(write_model("Q8_0"))]
    environment = {**os.environ, "LOSA_GGML_VERBOSE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"0 {WEIGHTS}"
    assert f"losa: {WEIGHTS} weights, {WEIGHTS} of them sparse" in done.stderr


CHECK = """
import ctypes, sys
from losa_deploy.ggml import load_plugin, plugin_path
from losa_deploy.errors import MissingError
library = ctypes.CDLL(sys.argv[1]) if len(sys.argv) > 1 else None
try:
    load_plugin(library).start()
except MissingError as error:
    sys.stdout.write(str(error))
"""


def refusal(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_an_unknown_version_is_refused_by_name(tmp_path: Path) -> None:
    """A real ggml whose version number was changed."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in ("libggml-base.so.0", "libggml-cpu.so.0", "libggml.so.0"):
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"\x000.25.3\x00", b"\x000.99.3\x00"))
    message = refusal(str(tmp_path / "libggml.so.0"))
    assert "ggml 0.99.3" in message
    assert "not a version the sparse backend was tested with (0.25.1, 0.25.3)" in message
    assert "0c1e" in message or "(" in message


def test_reasons_of_refusal() -> None:
    import llama_cpp

    ggml = str(Path(llama_cpp.__file__).parent / "lib" / "libggml.so.0")
    assert "no ggml is loaded in this process" in refusal()
    assert "LOSA_GGML is c; it takes a, b or off" in refusal(ggml, LOSA_GGML="c")
    assert "there are no such kernels here" in refusal(ggml, LOSA_KERNELS="none-such")
    assert refusal(ggml, LOSA_GGML="a") == ""


def test_virtual_file(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(bytes(range(256)) * 40)
    plugin = load_plugin()
    pieces = [(20, 100, 50), (5000, 3, 3000)]
    wanted = bytearray(9000)
    wanted[:7] = b"header!"
    for at, offset, count in pieces:
        wanted[at : at + count] = real.read_bytes()[offset : offset + count]
    c = ctypes.CDLL(None)
    c.fseek.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    c.ftell.argtypes, c.ftell.restype = [ctypes.c_void_p], ctypes.c_long
    c.fread.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    c.fread.restype = ctypes.c_size_t
    file = plugin.virtual_open(real, b"header!", pieces, len(wanted))
    try:
        assert c.fseek(file, 0, 2) == 0
        assert c.ftell(file) == len(wanted)
        for at, count in ((0, 9000), (6, 2), (10, 30), (69, 2), (4990, 4000), (7999, 5), (8990, 100)):
            buffer = ctypes.create_string_buffer(count)
            assert c.fseek(file, at, 0) == 0
            assert c.fread(buffer, 1, count, file) == min(count, 9000 - at)
            assert buffer.raw[: 9000 - at] == bytes(wanted[at : at + count])
    finally:
        plugin.virtual_close(file)


@pytest.mark.parametrize(
    "pieces",
    [[(3, 0, 10)], [(20, 10239, 2)], [(20, 0, 10), (25, 0, 10)], [(8995, 0, 10)], [(2**64 - 1, 0, 10)]],
    ids=["in the header", "behind the file", "overlap", "behind the end", "wraps"],
)
def test_virtual_files_with_wrong_pieces_are_refused(
    pieces: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    from losa_deploy.errors import InputError

    real = tmp_path / "real"
    real.write_bytes(bytes(10240))
    with pytest.raises(InputError, match="cannot be read"):
        load_plugin().virtual_open(real, b"header!", pieces, 9000)
    with pytest.raises(InputError, match="cannot be read"):
        load_plugin().virtual_open(tmp_path / "missing", b"header!", [], 9000)


def run_loadable(
    folder: Path, model: Path, logits: Path, **environment: str
) -> tuple[NDArray[np.float32], str]:
    """The last token's logits, and what the plug-in said."""
    command = [sys.executable, str(Path(__file__).with_name("loadable_child.py")), str(folder), str(model)]
    done = subprocess.run(
        [*command, str(logits)],
        env={**os.environ, "LOSA_GGML_VERBOSE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("losa:")]
    return np.load(logits), "\n".join(said)


@pytest.mark.parametrize("route", ["a", "b", "off"])
def test_prebuilt_libraries_load_the_plugin_themselves(
    route: str, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    """LOSA_TEST_GGML_DL: the folder with the libraries of the npm package @node-llama-cpp/linux-x64."""
    folder = Path(os.environ.get("LOSA_TEST_GGML_DL", ""))
    if not (folder / "libggml-base.so").is_file():
        pytest.skip("LOSA_TEST_GGML_DL names no folder with libggml-base.so")
    model = write_model("Q8_0")
    stock, nothing = run_loadable(folder, model, tmp_path / "stock.npy")
    environment = {"LOSA_GGML": route, "GGML_BACKEND_PATH": str(plugin_path())}
    ours, said = run_loadable(folder, model, tmp_path / "ours.npy", **environment)
    assert nothing == ""
    if route == "off":
        assert np.array_equal(ours, stock)
        assert "losa: off" in said
        return
    assert f"losa: route {route} " in said
    assert f"losa: {WEIGHTS} weights, {WEIGHTS} of them sparse" in said
    assert float(np.abs(ours - stock).max()) <= ROUNDING["Q8_0"] * 6 * float(stock.std())
