"""A value type and a layout from outside: one class and one object, known everywhere once registered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from losa_deploy.errors import UsageError
from losa_deploy.exporters.onnx.body import Body
from losa_deploy.exporters.onnx.functions import DECODERS, OPSET, VERSION, function
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackedTensor, PackOptions, choose, forced, unpack
from losa_deploy.layouts.base import Layout, register
from losa_deploy.layouts.blob import blob_bytes, from_blob, to_blob
from losa_deploy.layouts.dense import DENSE
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type, parse_op_type
from losa_deploy.layouts.values import ValueType
from losa_deploy.layouts.values import register as register_type
from losa_deploy.layouts.values.grouped import Grouped
from losa_deploy.recipe import load_recipe


class Two(Grouped):
    """Two bits: levels -2..1."""

    name, number, planes = "i2", 200, (2,)
    levels = (-2, 1)
    ggml = "Q4_0"


class Split(Grouped):
    """Three bits in two planes."""

    name, number, planes = "split", 201, (2, 1)
    levels = (-4, 3)
    ggml = "Q4_0"


@pytest.fixture(params=[Two, Split])
def kind(request: pytest.FixtureRequest) -> Iterator[ValueType]:
    found = register_type(request.param())
    yield found
    del VALUE_TYPES[found.name]


def matrix(
    rows: int, columns: int, pattern: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    rng = np.random.default_rng(rows * columns)
    order = rng.random((rows, columns // pattern[1], pattern[1])).argsort(axis=2)
    return rng.standard_normal((rows, columns)).astype(np.float32), (order < pattern[0]).reshape(
        rows, columns
    )


def product(packed: PackedTensor, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """In ONNX Runtime, by standard operators."""
    value = helper.make_tensor_value_info
    inputs = {f"w.{name}": array for name, array in packed.arrays.items()}
    node = helper.make_node(op_type(packed), ["X", *inputs], ["Y"], domain=DOMAIN, **attributes(packed))
    graph = helper.make_graph(
        [node],
        "toy",
        [value("X", TensorProto.FLOAT, list(x.shape))],
        [value("Y", TensorProto.FLOAT, [len(x), packed.shape[0]])],
        [numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in inputs.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    made = function(packed, unpadded=LAYOUTS[packed.layout].unpadded(packed))
    model = helper.make_model(graph, opset_imports=imports, functions=[made], ir_version=10)
    result: NDArray[np.float32] = ort.InferenceSession(model.SerializeToString()).run(None, {"X": x})[0]
    return result


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm", "tiled"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (32, 304), (48, 128)])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 16)])
def test_a_value_type_is_one_class(
    kind: ValueType, layout: str, rows: int, columns: int, pattern: tuple[int, int]
) -> None:
    weight, mask = matrix(rows, columns, pattern)
    options = PackOptions(kind.name, group_size=32, search=True, pattern=pattern if layout == "nm" else None)
    if not (LAYOUTS[layout].stores(kind) and LAYOUTS[layout].tolerates(mask, options)):
        return  # refused below
    packed = LAYOUTS[layout].pack(weight, mask, options)
    assert packed.nbytes == LAYOUTS[layout].size(mask, options)
    assert len(to_blob(packed)) == blob_bytes(layout, mask, options)
    again = from_blob(to_blob(packed))
    assert (again.value_type, again.sha256, again.nnz) == (kind.name, packed.sha256, int(mask.sum()))
    decoded = unpack(again).weight
    kept = np.where(mask, weight, np.float32(0))
    assert (np.abs(decoded - kept) <= kind.error_bound(kept, 32)).all()
    assert len(np.unique(decoded[0, :32])) > 1
    x = np.random.default_rng(1).standard_normal((2, columns)).astype(np.float32)
    assert parse_op_type(op_type(packed)) == (LAYOUTS[layout].form(packed), kind.name, 1)
    assert parse_op_type(op_type(packed, 2, gated=True)) == (LAYOUTS[layout].form(packed), kind.name, 2)
    assert np.allclose(product(packed, x), x @ decoded.T, atol=1e-4)


def test_dense_rows_of_every_length(kind: ValueType) -> None:
    for columns in (1, 3, 17, 127, 128, 129, 260):
        weight = np.random.default_rng(columns).standard_normal((3, columns)).astype(np.float32)
        packed = DENSE.pack(weight, np.ones((3, columns), np.bool_), PackOptions(kind.name, group_size=32))
        decoded = unpack(from_blob(to_blob(packed))).weight
        assert (np.abs(decoded - weight) <= kind.error_bound(weight, 32)).all()
        x = np.random.default_rng(1).standard_normal((2, columns)).astype(np.float32)
        assert np.allclose(product(packed, x), x @ decoded.T, atol=1e-4)


def test_a_registered_value_type_is_known_to_recipes(kind: ValueType) -> None:
    assert load_recipe(overrides=[("export.value_type", kind.name)]).export.value_type == kind.name


def test_an_unknown_value_type_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"should be one of f32, f16, i8, .*\bi4, i3"):
        load_recipe(overrides=[("export.value_type", "i2")])


def test_a_value_type_is_chosen_a_layout_for_by_its_bytes(kind: ValueType) -> None:
    mask, options = matrix(128, 512, (3, 8))[1], PackOptions(kind.name, group_size=32)
    assert choose(mask, options).layout == "nm"
    assert choose(matrix(128, 512, (1, 4))[1], options).layout == "tiled"
    mask[0, 0] ^= True
    assert choose(mask, options).layout == "bitmask"
    mask = matrix(128, 512, (7, 8))[1]
    assert (choose(mask, options).layout, choose(mask, options).bytes) == ("dense", DENSE.size(mask, options))


def test_what_a_layout_cannot_store_is_refused_by_name() -> None:
    mask = matrix(128, 512, (2, 4))[1]
    for layout in ("tiled", "sliding"):
        with pytest.raises(UsageError, match=f"--layout {layout} stores .*, not f16"):
            forced(layout, "model.layers.0.mlp.up_proj", mask, PackOptions("f16"))


def reverse(packed: PackedTensor) -> PackedTensor:
    arrays = dict(packed.arrays)
    arrays["values"] = np.ascontiguousarray(arrays["values"][::-1])
    return replace(packed, layout="reversed", arrays=arrays)


@pytest.fixture
def reversed_rows() -> Iterator[Layout]:
    """Dense, the last row first."""
    layout = register(
        replace(
            DENSE,
            name="reversed",
            number=200,
            forms=("Reversed",),
            pack=lambda weight, mask, options: reverse(DENSE.pack(weight, mask, options)),
            unpack=lambda packed: DENSE.unpack(replace(reverse(packed), layout="dense")),
            form=lambda packed: "Reversed",
        )
    )

    def decode(body: Body, kind: ValueType, unpadded: bool) -> str:
        rows = DECODERS["Dense"](body, kind, unpadded)
        return body.op("Slice", rows, body.ints(-1), body.ints(-1 << 31), body.ints(0), body.ints(-1))

    DECODERS["Reversed"] = decode
    yield layout
    del LAYOUTS["reversed"], DECODERS["Reversed"]


@pytest.mark.parametrize("value_type", list(VALUE_TYPES))
def test_a_layout_is_one_object_and_a_decoder(reversed_rows: Layout, value_type: str) -> None:
    weight, mask = matrix(6, 128, (2, 4))
    options = PackOptions(value_type)
    packed = reversed_rows.pack(weight, mask, options)
    right = DENSE.pack(weight, mask, options)
    assert packed.sha256 != right.sha256
    again = from_blob(to_blob(packed))
    assert again.layout == "reversed"
    assert unpack(again).weight.tobytes() == unpack(right).weight.tobytes()
    assert load_recipe(overrides=[("export.layout", "reversed")]).export.layout == "reversed"
    x = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    assert op_type(packed) == f"ReversedMatMul{value_type.upper()}"
    assert np.allclose(product(packed, x), x @ unpack(right).weight.T, atol=1e-4)
    assert forced("reversed", "x", mask, options).bytes == packed.nbytes
