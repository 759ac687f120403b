"""Every `ai.losa` operator, run through its function: ONNX Runtime and the reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from losa_deploy.exporters.onnx.functions import OPSET, VERSION, function
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, unpack
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type

Pack = Callable[..., PackedTensor]
RandomMask = Callable[[int, int, tuple[int, int] | None, int], NDArray[np.bool_]]
SIZES = ((5, 1), (3, 7), (8, 64), (4, 65), (64, 172), (6, 576), (5, 256))


def one_node_model(packed: PackedTensor, *, unpadded: bool) -> onnx.ModelProto:
    """Y = X @ W.T with the packed weight."""
    components = [numpy_helper.from_array(a, name) for name, a in packed.arrays.items()]
    node = helper.make_node(
        op_type(packed), ["X", *packed.arrays], ["Y"], domain=DOMAIN, **attributes(packed)
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [value("X", onnx.TensorProto.FLOAT, ["batch", "tokens", packed.shape[1]])],
        [value("Y", onnx.TensorProto.FLOAT, ["batch", "tokens", packed.shape[0]])],
        components,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph,
        opset_imports=imports,
        functions=[function(packed, unpadded=unpadded)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="module")
def pack(random_mask: RandomMask, pair_mask: Callable[[int, int, int], NDArray[np.bool_]]) -> Pack:
    """A function: layout, value type, rows, columns, options of `PackOptions` → a random packed tensor.

    The layout `pairs` is a bitmask of rows that share masks.
    """

    def make(layout: str, value_type: str, rows: int, columns: int, **options: object) -> PackedTensor:
        name, _, words = layout.partition(" ")
        pattern = None
        if words:
            n, m = map(int, words.split(":"))
            pattern = n, m
        weight = np.random.default_rng(columns + rows).standard_normal((rows, columns), np.float32)
        mask, shared = random_mask(rows, columns, pattern, 0), 1
        if name == "pairs":
            name, mask, shared = "bitmask", pair_mask(rows, columns, 0), 2
        chosen = PackOptions(value_type, pattern=pattern, rows_per_mask=shared, **options)  # type: ignore[arg-type]
        return LAYOUTS[name].pack(weight, mask, chosen)

    return make


def unpadded(packed: PackedTensor) -> bool:
    return LAYOUTS[packed.layout].unpadded(packed)


def check(packed: PackedTensor, *, reference: bool) -> None:
    """An unpadded tensor with both functions: a model that has others too has the general one."""
    for promised in {False, unpadded(packed)}:
        check_model(one_node_model(packed, unpadded=promised), packed, reference=reference)


def check_model(model: onnx.ModelProto, packed: PackedTensor, *, reference: bool) -> None:
    weight = unpack(packed).weight
    x = np.random.default_rng(0).standard_normal((2, 3, packed.shape[1])).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    tolerance = 1e-6 * (np.abs(x.astype(np.float64)) @ np.abs(weight.T.astype(np.float64))) + 1e-12
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    assert (np.abs(session.run(None, {"X": x})[0] - expected) <= tolerance).all()
    if reference:
        assert (np.abs(ReferenceEvaluator(model).run(None, {"X": x})[0] - expected) <= tolerance).all()


STREAMS = ("bitmask", "nm 1:2", "nm 1:4", "nm 2:4", "nm 2:16", "nm 4:16", "nm 1:32", "nm 3:5")
TYPES = ("f32", "f16", "i8", "i4", "i3")
PAIRS = [("pairs", kind) for kind in ("i8", "i4", "i3")]
LAYOUTS_AND_TYPES = [*((layout, kind) for layout in ("dense", *STREAMS) for kind in TYPES), *PAIRS]
PATTERNS = [(1, 16), (3, 16), (6, 16), (15, 16), (2, 4), (1, 4)]
TILES = [(pattern, kind) for pattern in PATTERNS for kind in ("i8", "i4")]


@pytest.mark.parametrize(("layout", "value_type"), LAYOUTS_AND_TYPES)
def test_operator_equals_the_unpacked_weight(layout: str, value_type: str, pack: Pack) -> None:
    for rows, columns in SIZES:
        group_size = 32 if columns < 100 else 128
        check(pack(layout, value_type, rows, columns, group_size=group_size), reference=True)


@pytest.mark.parametrize(("pattern", "value_type"), [*TILES, ((2, 4), "i3"), ((1, 4), "i3")])
def test_operator_of_tiles_equals_the_unpacked_weight(
    pattern: tuple[int, int], value_type: str, pack: Pack
) -> None:
    layout = f"tiled {pattern[0]}:{pattern[1]}"
    for rows, columns in ((16, 16), (48, 80), (32, 304)):
        check(pack(layout, value_type, rows, columns, group_size=64), reference=True)


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_operator_of_sliding_windows_equals_the_unpacked_weight(
    value_type: str, sliding_mask: Callable[[int, int, int], NDArray[np.bool_]]
) -> None:
    for rows, columns in ((16, 16), (48, 80), (32, 304)):
        weight = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
        options = PackOptions(value_type, 64)
        check(LAYOUTS["sliding"].pack(weight, sliding_mask(rows, columns, 0), options), reference=True)


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("keep", [False, True])
def test_all_or_nothing_kept(value_type: str, keep: bool) -> None:
    weight = np.random.default_rng(1).standard_normal((3, 70)).astype(np.float32)
    mask = np.full((3, 70), keep)
    check(LAYOUTS["bitmask"].pack(weight, mask, PackOptions(value_type)), reference=True)


FOLDED = [*((layout, kind) for layout in ("dense", "bitmask", "nm 1:4") for kind in TYPES), *PAIRS]


@pytest.mark.parametrize(("layout", "value_type"), FOLDED)
def test_decoding_is_folded_at_load(layout: str, value_type: str, pack: Pack, tmp_path: object) -> None:
    packed = pack(layout, value_type, 64, 172)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = f"{tmp_path}/folded.onnx"
    ort.InferenceSession(one_node_model(packed, unpadded=unpadded(packed)).SerializeToString(), options)
    folded = onnx.load(f"{tmp_path}/folded.onnx")
    left = {node.op_type for node in folded.graph.node}
    assert left == ({"MatMul", "Mul"} if value_type == "i8" else {"MatMul"})


@pytest.mark.parametrize(
    ("layout", "value_type"),
    [*((layout, kind) for layout in ("dense", "bitmask", "nm 2:4", "nm 1:4") for kind in TYPES), *PAIRS],
)
def test_one_operator_of_three_weights(layout: str, value_type: str, pack: Pack) -> None:
    """As q, k and v: different numbers of rows, one input, three outputs."""
    weights = [pack(layout, value_type, rows, 172) for rows in (9, 4, 3)]
    first = weights[0]
    inputs = {f"w{i}.{name}": array for i, w in enumerate(weights) for name, array in w.arrays.items()}
    node = helper.make_node(
        op_type(first, 3), ["X", *inputs], ["Y0", "Y1", "Y2"], domain=DOMAIN, **attributes(first)
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "three",
        [value("X", onnx.TensorProto.FLOAT, ["batch", "tokens", 172])],
        [
            value(f"Y{i}", onnx.TensorProto.FLOAT, ["batch", "tokens", w.shape[0]])
            for i, w in enumerate(weights)
        ],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph, opset_imports=imports, functions=[function(first, 3, unpadded=unpadded(first))], ir_version=10
    )
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((1, 2, 172)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    for results in (session.run(None, {"X": x}), ReferenceEvaluator(model).run(None, {"X": x})):
        for y, packed in zip(results, weights, strict=True):
            assert np.allclose(y, x @ unpack(packed).weight.T, atol=1e-4)


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm 2:4", "nm 1:4"])
def test_one_operator_of_a_gated_pair(layout: str, value_type: str, pack: Pack) -> None:
    """As gate and up: one input, one output, in a model that has the other operator of two weights too."""
    first = pack(layout, value_type, 24, 172)
    turned = np.roll(first.arrays["values"], 1, axis=0)
    weights = [first, replace(first, arrays={**first.arrays, "values": turned})]
    inputs = {f"w{i}.{name}": array for i, w in enumerate(weights) for name, array in w.arrays.items()}
    nodes = [
        helper.make_node(
            op_type(first, 2, gated=gated), ["X", *inputs], outputs, domain=DOMAIN, **attributes(first)
        )
        for gated, outputs in ((True, ["Y"]), (False, ["G", "U"]))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "gated",
        [value("X", onnx.TensorProto.FLOAT, ["batch", "tokens", 172])],
        [value(name, onnx.TensorProto.FLOAT, ["batch", "tokens", 24]) for name in ("Y", "G", "U")],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    functions = [function(first, 2, gated=gated, unpadded=unpadded(first)) for gated in (True, False)]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((1, 2, 172)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    for y, gate, up in (session.run(None, {"X": x}), ReferenceEvaluator(model).run(None, {"X": x})):
        assert np.abs(gate - up).max() > 0.1
        assert np.allclose(gate, x @ unpack(first).weight.T, atol=1e-4)
        # A Sigmoid is right to some 1e-7 of 1, not of itself.
        bound = 1e-6 * np.abs(gate * up) + 1e-12
        assert (np.abs(y - gate / (1 + np.exp(-gate.astype(np.float64))) * up) <= bound).all()
