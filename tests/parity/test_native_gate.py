"""Operators that gate: SiLU of one product times another one, against a float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper

from losa_deploy._native import targets
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, unpack

from .operators import (
    ROUNDING,
    VALUE_TYPES,
    Array,
    Pack,
    activations,
    model_of,
    open_native,
    refused,
    tolerance,
)


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    activated: NDArray[np.float64] = x / (1 + np.exp(np.minimum(-x, 700)))
    return activated


def check_gated(session: ort.InferenceSession, weights: Sequence[PackedTensor], x: Array) -> None:
    """Both products may be off by their tolerance; SiLU is at most 1.1 times as steep as its argument."""
    (result,) = session.run(None, {"X": x})
    gate, up = (unpack(packed).weight.astype(np.float64) for packed in weights)
    exact = x.astype(np.float64)
    off_gate, off_up = tolerance(weights[0], x, gate), tolerance(weights[1], x, up)
    activated, other = silu(exact @ gate.T), exact @ up.T
    assert result.shape == activated.shape
    bound = 1.1 * off_gate * (np.abs(other) + off_up) + np.abs(activated) * off_up
    bound += 8 * ROUNDING * np.abs(activated * other) + 1e-30
    assert (np.abs(result - activated * other) <= bound).all()


GATED = [
    *product(("dense", "bitmask", "nm 2:4", "nm 1:4"), VALUE_TYPES),
    *product(("tiled 6:16", "tiled 2:4", "sliding"), ("i8", "i4")),
    *product(("dense", "tiled 2:4", "sliding"), ("i3",)),
    *product(("pairs",), ("i8", "i4", "i3")),
]


@pytest.mark.parametrize(("layout", "value_type"), GATED)
def test_gated_operators_equal_the_oracle(layout: str, value_type: str, pack: Pack) -> None:
    """Also where threads split the rows, and where a prompt is gated in blocks of rows."""
    tiles = layout.startswith(("tiled", "sliding"))
    for rows, columns in ((80, 176), (1024, 576)) if tiles else ((67, 172), (1021, 576)):
        weights = [pack(layout, value_type, rows, columns, seed=i) for i in range(2)]
        session = open_native(model_of(weights, gated=True), threads=3)
        for tokens in (1, 5, 90):
            check_gated(session, weights, activations(tokens, columns))


def test_a_gated_operator_equals_the_graph_without_it(pack: Pack) -> None:
    """But for the sigmoid, which ONNX Runtime's operator computes to some 1e-7 of 1, not of itself."""
    weights = [pack("bitmask", "i4", 1021, 576, seed=i) for i in range(2)]
    together = model_of(weights)
    together.graph.node.extend(
        helper.make_node(kind, inputs, [output])
        for kind, inputs, output in (
            ("Sigmoid", ["Y0"], "sigmoid"),
            ("Mul", ["Y0", "sigmoid"], "silu"),
            ("Mul", ["silu", "Y1"], "Y"),
        )
    )
    together.graph.output.append(helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None))
    apart, gated = open_native(together, threads=2), open_native(model_of(weights, gated=True), threads=2)
    for tokens in (1, 40):
        x = activations(tokens, 576)
        gate, up, expected = apart.run(None, {"X": x})
        (found,) = gated.run(None, {"X": x})
        assert np.abs(expected).max() > 1
        assert (np.abs(found - expected) <= 1e-6 * np.abs(gate * up) + 1e-12).all()


GATES = """
import sys
import numpy as np, onnxruntime as ort
from losa_deploy.runtimes.ort import register
options = ort.SessionOptions()
register(options)
session = ort.InferenceSession(sys.argv[1], options)
np.save(sys.argv[3], session.run(None, {"X": np.load(sys.argv[2])})[0])
"""


@pytest.mark.parametrize("target", targets())
def test_the_gate_of_every_target_and_size(target: str, tmp_path: Path) -> None:
    """Identity matrices, so that the products are the activations: -120 to 120, in a row of odd length."""
    count = 1203
    eye, mask = np.eye(count, dtype=np.float32), np.ones((count, count), np.bool_)
    weights = [LAYOUTS["dense"].pack(eye, mask, PackOptions("f32"))] * 2
    x = np.linspace(-120, 120, count, dtype=np.float32)[None, None]
    onnx.save(model_of(weights, gated=True), tmp_path / "gate.onnx")
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("gate.onnx", "x.npy", "y.npy")]
    environment = {**os.environ, "LOSA_KERNELS": target}
    subprocess.run([sys.executable, "-c", GATES, *paths], env=environment, check=True)
    exact = x.astype(np.float64)
    error = np.abs(np.load(paths[2]) - silu(exact) * exact)
    assert (error <= 6e-7 * np.abs(silu(exact) * exact) + 4e-34).all()


def test_a_gate_of_other_size_is_refused(pack: Pack) -> None:
    weights = [pack("bitmask", "i8", rows, 64) for rows in (9, 10)]
    assert "the gate has 9 rows, but what it gates has 10" in refused(model_of(weights, gated=True))
