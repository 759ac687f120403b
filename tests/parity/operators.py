"""One operator of `ai.losa` in a model of its own, what it gets, and how far it may be off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from losa_deploy.exporters.onnx.functions import OPSET, VERSION
from losa_deploy.layouts import PackedTensor
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type
from losa_deploy.runtimes.ort import register

NODE = "layer.7.the_node"
ROUNDING = 2.0**-24
VALUE_TYPES: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")
Array = NDArray[np.float32]
Pack = Callable[..., PackedTensor]


def model_of(
    weights: Sequence[PackedTensor],
    *,
    changed: dict[str, NDArray[np.generic]] | None = None,
    dynamic: str = "",
    gated: bool = False,
    **overrides: int | None,
) -> onnx.ModelProto:
    """One node without a function, so that only the library can run it.

    `changed` replaces components, `dynamic` makes one a graph input, `gated` makes one output of two weights,
    `overrides` sets attributes or, with None, leaves them out.
    """
    arrays = {
        f"w{i}.{name}": (changed or {}).get(name, array)
        for i, packed in enumerate(weights)
        for name, array in packed.arrays.items()
    }
    values = attributes(weights[0]) | overrides
    outputs = [f"Y{i}" for i in range(1 if gated else len(weights))]
    node = helper.make_node(
        op_type(weights[0], len(weights), gated=gated),
        ["X", *arrays],
        outputs,
        name=NODE,
        domain=DOMAIN,
        **{key: value for key, value in values.items() if value is not None},
    )
    value_info = helper.make_tensor_value_info
    inputs = [value_info("X", onnx.TensorProto.FLOAT, ["batch", "tokens", "width"])]
    if dynamic:
        array = arrays.pop(dynamic)
        inputs.append(value_info(dynamic, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    graph = helper.make_graph(
        [node],
        "one",
        inputs,
        [value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def open_native(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    register(options)
    return ort.InferenceSession(model.SerializeToString(), options)


def activations(tokens: int, columns: int) -> Array:
    """Rows of very different size, one of them all zero."""
    rng = np.random.default_rng((tokens, columns))
    x = rng.standard_normal((1, tokens, columns)) * 10.0 ** rng.integers(-3, 3, (1, tokens, 1))
    if tokens > 1:
        x[:, 1] = 0
    return x.astype(np.float32)


def tolerance(packed: PackedTensor, x: Array, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Most that a right kernel can be off: f32 sums, and for integers int8 activations.

    An activation is rounded to a multiple of its group's largest magnitude / 127, so it is off by half
    of that; groups are 64 positions, or those of the weight's own scales.
    """
    size_of_x, columns = np.abs(x.astype(np.float64)), packed.shape[1]
    error = ROUNDING * (columns + 8) * size_of_x
    if packed.value_type in ("i8", "i4", "i3"):
        size = packed.params.get("group_size", 64)
        padded = np.pad(size_of_x, ((0, 0), (0, 0), (0, -columns % size)))
        step = padded.reshape(*padded.shape[:2], -1, size).max(axis=3) / 127
        error = (0.5 + ROUNDING * (columns + 8)) * np.repeat(step, size, axis=2)[..., :columns] + error
    bound: NDArray[np.float64] = error @ np.abs(weight.T) + 1e-30
    return bound


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(Exception, match=r"ai\.losa") as caught:
        open_native(model)
    assert NODE in str(caught.value)
    return str(caught.value)
