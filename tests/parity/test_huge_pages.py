"""Weights that ONNX Runtime maps from a file are moved to huge pages, and are in memory once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from losa_deploy.exporters.onnx.functions import OPSET, VERSION
from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ROWS, COLUMNS = 4096, 2048
MEGABYTE = 1 << 20

Run = Callable[..., dict[str, int | str]]
PROGRAM = """
import numpy as np, onnxruntime as ort
from losa_deploy.runtimes.ort import register

before = pages()["huge"]
options = ort.SessionOptions()
register(options)
session = ort.InferenceSession(sys.argv[1], options)
x = np.random.default_rng(3).standard_normal((1, 1, 2048)).astype(np.float32)
y = session.run(None, {"X": x})[0]
found = pages()
found["huge"] -= before
del session
left = pages()["huge"] - before
print(json.dumps(found | {"left": left, "y": y.tobytes().hex()}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bitmask i8 node; its weight is in a file beside the model."""
    rng = np.random.default_rng(5)
    mask = rng.random((ROWS, COLUMNS)) < 0.5
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    packed = LAYOUTS["bitmask"].pack(weight, mask, PackOptions("i8"))
    value_info = helper.make_tensor_value_info
    node = helper.make_node(
        op_type(packed), ["X", *packed.arrays], ["Y"], domain=DOMAIN, **attributes(packed)
    )
    graph = helper.make_graph(
        [node],
        "one",
        [value_info("X", onnx.TensorProto.FLOAT, ["batch", "tokens", COLUMNS])],
        [value_info("Y", onnx.TensorProto.FLOAT, ["batch", "tokens", ROWS])],
        [numpy_helper.from_array(array, name) for name, array in packed.arrays.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    path = tmp_path_factory.mktemp("huge") / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        path,
        save_as_external_data=True,
        location="weights.bin",
    )
    return path


def run_program(pages: str, model: Path, **environment: str) -> dict[str, int | str]:
    done = subprocess.run(
        [sys.executable, "-c", pages + PROGRAM, str(model), "weights.bin"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int | str] = json.loads(done.stdout)
    return found


@pytest.fixture
def run(memory_pages: str) -> Run:
    """The program with a model → what it measured."""
    return partial(run_program, memory_pages)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text() or not os.access("/proc/self/pagemap", os.R_OK),
    reason="this system gives programs no huge pages, or does not say which pages they have",
)
def test_weights_move_to_huge_pages_and_are_in_memory_once(run: Run, model: Path) -> None:
    stored = (model.parent / "weights.bin").stat().st_size
    kept = run(model, LOSA_HUGE_PAGES="0")
    moved = run(model)
    assert kept["huge"] == 0 and int(kept["file"]) >= 0.9 * stored
    assert int(moved["huge"]) >= 0.7 * stored, "the machine may have no free huge page"
    assert int(moved["file"]) < 0.1 * stored, "the pages of the file are still there"
    assert moved["left"] == 0, "a closed session keeps its weights"
    assert moved["y"] == kept["y"]


def test_weights_inside_of_the_model_stay_where_they_are(run: Run, model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.onnx"
    onnx.save(onnx.load(model), whole)
    inside, beside = run(whole), run(model, LOSA_HUGE_PAGES="0")
    assert inside["huge"] == 0 and inside["y"] == beside["y"]
