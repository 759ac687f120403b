"""Every `ai.losa` operator run by the native library inside ONNX Runtime, against a float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from losa_deploy._native import targets
from losa_deploy.cli.main import main
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.exporters.onnx.functions import OPSET, VERSION
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions, unpack
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.ort import register

from .conftest import export_as

LAYOUT_NAMES = (
    "dense", "bitmask", "nm 1:2", "nm 1:4", "nm 2:4", "nm 2:5", "nm 2:16", "nm 4:16", "nm 1:32",
)  # fmt: skip
VALUE_TYPES: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")
NODE = "layer.7.the_node"
ROUNDING = 2.0**-24
Array = NDArray[np.float32]
Pack = Callable[..., PackedTensor]
RandomMask = Callable[[int, int, tuple[int, int] | None, int], NDArray[np.bool_]]
SlidingMask = Callable[[int, int, int], NDArray[np.bool_]]


@pytest.fixture(scope="module")
def pack(random_mask: RandomMask, sliding_mask: SlidingMask, pair_mask: SlidingMask) -> Pack:
    """A function: layout, value type, rows, columns → a random packed tensor.

    The layout `pairs` is a bitmask of rows that share masks.
    """

    def make(
        layout: str, value_type: str, rows: int, columns: int, *, seed: int = 0, scale: str = "f32"
    ) -> PackedTensor:
        name, _, words = layout.partition(" ")
        pattern = None
        if words:
            n, m = map(int, words.split(":"))
            pattern = n, m
        options = PackOptions(
            value_type,
            group_size=32 if columns < 100 else 128 if columns < 500 else 64,
            scale_type="f16" if scale == "f16" else "f32",
            pattern=pattern,
            rows_per_mask=2 if name == "pairs" else 1,
        )
        weight = np.random.default_rng((rows, columns, seed)).standard_normal((rows, columns), np.float32)
        if name == "sliding":
            return LAYOUTS[name].pack(weight, sliding_mask(rows, columns, seed), options)
        if name == "pairs":
            return LAYOUTS["bitmask"].pack(weight, pair_mask(rows, columns, seed), options)
        return LAYOUTS[name].pack(weight, random_mask(rows, columns, pattern, seed), options)

    return make


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


def check(session: ort.InferenceSession, weights: Sequence[PackedTensor], x: Array) -> None:
    results = session.run(None, {"X": x})
    assert len(results) == len(weights)
    for result, packed in zip(results, weights, strict=True):
        weight = unpack(packed).weight.astype(np.float64)
        assert result.shape == (*x.shape[:-1], packed.shape[0])
        error = np.abs(result - x.astype(np.float64) @ weight.T)
        assert (error <= tolerance(packed, x, weight)).all()


@pytest.mark.parametrize(("layout", "value_type"), [*product(LAYOUT_NAMES, VALUE_TYPES)])
def test_operators_equal_the_oracle(layout: str, value_type: str, pack: Pack) -> None:
    """One awkward size: tests/kernels has the others."""
    weights = [pack(layout, value_type, count, 172, seed=i) for i, count in enumerate((67, 69, 1))]
    for shared in (1, 2, 3):
        session = open_native(model_of(weights[:shared]), threads=2)
        for tokens in (1, 17):
            check(session, weights[:shared], activations(tokens, 172))


@pytest.mark.parametrize(
    ("layout", "value_type"),
    [
        *product(("tiled 6:16", "tiled 3:16", "tiled 2:4", "tiled 1:4"), ("i8", "i4")),
        ("tiled 2:4", "i3"),
        ("tiled 1:4", "i3"),
        *product(("sliding",), ("i8", "i4", "i3")),
    ],
)
def test_tiles_equal_the_oracle(layout: str, value_type: str, pack: Pack) -> None:
    weights = [pack(layout, value_type, count, 176, seed=i) for i, count in enumerate((64, 96, 16))]
    for shared in (1, 2, 3):
        session = open_native(model_of(weights[:shared]), threads=3)
        for tokens in (1, 17):
            check(session, weights[:shared], activations(tokens, 176))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_rows_that_share_masks_equal_the_oracle(value_type: str, pack: Pack) -> None:
    weights = [pack("pairs", value_type, count, 172, seed=i) for i, count in enumerate((67, 68, 2))]
    for shared in (1, 2, 3):
        session = open_native(model_of(weights[:shared]), threads=2)
        for tokens in (1, 5, 17):
            check(session, weights[:shared], activations(tokens, 172))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_what_does_not_belong_to_shared_masks_is_refused(value_type: str, pack: Pack) -> None:
    packed = pack("pairs", value_type, 9, 65)
    assert "rows_per_mask is missing" in refused(model_of([packed], rows_per_mask=None))
    assert "rows_per_mask is 4, expected 2 to 2" in refused(model_of([packed], rows_per_mask=4))
    assert "out_features is 10" in refused(model_of([packed], out_features=10))
    for name in ("positions", "scale"):
        shorter = packed.arrays[name][:-1]
        assert "a component has not the bytes" in refused(model_of([packed], changed={name: shorter}))


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


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm 1:4", "nm 2:4", "tiled 5:16", "tiled 2:4"])
def test_row_scales_may_be_f16(layout: str, pack: Pack) -> None:
    packed = pack(layout, "i8", 16, 176, scale="f16")
    assert packed.arrays["scale"].dtype == np.float16
    check(open_native(model_of([packed])), [packed], activations(3, 176))


@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_work_that_is_split_among_threads(value_type: str, pack: Pack) -> None:
    """Enough rows for many chunks, in weights of unequal size, and a prompt that is prepared in parts."""
    weights = [pack("bitmask", value_type, rows, 576, seed=rows) for rows in (1021, 192, 13)]
    session = open_native(model_of(weights), threads=4)
    for tokens in (1, 2, 64):
        check(session, weights, activations(tokens, 576))


def test_other_ranks_and_no_tokens(pack: Pack) -> None:
    packed = pack("bitmask", "i8", 9, 64)
    model = model_of([packed])
    del model.graph.input[0].type.tensor_type.shape.dim[0]
    flat = activations(3, 64)[0]
    (result,) = open_native(model).run(None, {"X": flat})
    (same,) = open_native(model_of([packed])).run(None, {"X": flat[None]})
    assert np.array_equal(result, same[0])
    (none,) = open_native(model).run(None, {"X": flat[:0]})
    assert none.shape == (0, 9)


def test_the_kernel_wins_over_the_function_of_the_model(pack: Pack) -> None:
    packed = pack("bitmask", "f32", 9, 64)
    model = model_of([packed])
    body = [helper.make_node("Sub", ["X", "X"], ["Y"])]
    imports = [helper.make_opsetid("", OPSET)]
    inputs, names = ["X", *packed.arrays], list(attributes(packed))
    model.functions.append(
        helper.make_function(DOMAIN, op_type(packed), inputs, ["Y"], body, imports, attributes=names)
    )
    check(open_native(model), [packed], activations(3, 64))


def test_two_threads_on_one_session(pack: Pack) -> None:
    weights = [pack("bitmask", "i8", rows, 576, seed=rows) for rows in (576, 192, 192)]
    session = open_native(model_of(weights), threads=2)
    inputs = [activations(1, 576), activations(40, 576)]
    alone = [session.run(None, {"X": x}) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            results = session.run(None, {"X": inputs[index]})
            if not all(np.array_equal(a, b) for a, b in zip(results, alone[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(Exception, match=r"ai\.losa") as caught:
        open_native(model)
    assert NODE in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shared", [1, 3])
def test_another_format_is_refused(shared: int, pack: Pack) -> None:
    weights = [pack("bitmask", "i8", 9, 64)] * shared
    assert "format 2, this library reads format 1" in refused(model_of(weights, format=2))
    assert "this library reads format 1" in refused(model_of(weights, format=None))


def test_attributes_are_checked(pack: Pack) -> None:
    packed = pack("nm 1:4", "i4", 9, 64)
    assert "in_features is missing" in refused(model_of([packed], in_features=None))
    assert "group_size is 1000, expected 32 to 128" in refused(model_of([packed], group_size=1000))
    assert "out_features is 8" in refused(model_of([packed], out_features=8))
    assert "position_bits is 0" in refused(model_of([packed], position_bits=0))
    assert "damaged" in refused(model_of([packed], m=8))


def test_truncated_components_are_refused(pack: Pack) -> None:
    """What the kernels' loader refuses (tests/kernels/test_refusals.py) comes with the node and the sizes."""
    packed = pack("bitmask", "i4", 9, 64)
    for name, array in packed.arrays.items():
        shorter = array[:, :-1] if array.ndim == 2 else array[:-1]
        reason = refused(model_of([packed], changed={name: shorter}))
        assert "a component has not the bytes" in reason
        assert f"{name} {shorter.nbytes}" in reason


def test_damaged_tiles_are_refused(pack: Pack) -> None:
    packed = pack("tiled 2:4", "i8", 32, 64)
    open_native(model_of([packed]))
    assert "outside of the format" in refused(model_of([packed], n=3))
    wrong = packed.arrays["positions"].copy()
    wrong[1, 2, 0] = wrong[1, 2, 1] = 3  # both slots of a row at one position
    assert "not N of every M" in refused(model_of([packed], changed={"positions": wrong}))


def test_bad_masks_are_refused(pack: Pack) -> None:
    packed = pack("bitmask", "i8", 9, 65)
    positions = packed.arrays["positions"].copy()
    positions[4, 15] |= np.uint8(128)
    reason = refused(model_of([packed], changed={"positions": positions}))
    assert "a position lies outside of the row" in reason


CLAIMS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "bitmask": ((2**31 - 1, 0), {}),
    "bitmask, as many as the format allows": ((2**30, 0), {}),
    "bitmask, 2 GB of row starts": ((2**28, 0), {"in_features": 1}),
    "nm 1:4": ((2**30, 0), {}),
    "nm 2:4": ((2**30, 0), {"in_features": 2**31 - 1}),
    "dense": ((2**30, 0), {"in_features": 2**30}),
    "tiled 5:16": ((2**26, 0), {"in_features": 2**30}),
    "tiled 2:4": ((2**26, 0), {}),
}
UNDER_A_LIMIT = """
import resource, sys
import onnxruntime as ort
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.ort import register
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
register(options)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        ort.InferenceSession(path, options)
        print("opened")
    except Exception as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux counts it")
@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_what_a_shape_claims_costs_no_memory(value_type: str, tmp_path: Path, pack: Pack) -> None:
    """Initializers without a byte that claim up to two billion rows, in a process that may take 256 MB."""
    paths = []
    for index, (layout, (shape, attributes_)) in enumerate(CLAIMS.items()):
        packed = pack(layout.split(",")[0], value_type, 32, 64)
        empty = {name: np.empty(shape, array.dtype) for name, array in packed.arrays.items()}
        model = model_of([packed], changed=empty, **({"out_features": None} | attributes_))
        paths.append(tmp_path / f"{index}.onnx")
        onnx.save(model, paths[-1])
    sound = tmp_path / "sound.onnx"
    onnx.save(model_of([pack("bitmask", value_type, 4096, 1024)]), sound)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, *map(str, paths), str(sound)],
        capture_output=True,
        text=True,
        check=True,
    )
    *answers, last = done.stdout.splitlines()
    assert last == "opened" and len(answers) == len(CLAIMS)
    for layout, answer in zip(CLAIMS, answers, strict=True):
        assert f"node '{NODE}': weight 0 is damaged: " in answer, f"{layout}: {answer}"


@pytest.fixture(scope="module")
def two_billion_rows(merged_llama: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder one of whose weights claims them."""
    folder = tmp_path_factory.mktemp("hostile")
    export_as(OnnxExporter(), merged_llama, ExportRecipe(layout="bitmask"), folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    positions = next(t for t in model.graph.initializer if t.name.endswith("positions"))
    positions.ClearField("external_data")
    positions.ClearField("raw_data")
    positions.data_location = onnx.TensorProto.DEFAULT
    positions.dims[:] = [2**31 - 1, 0]
    (node,) = (node for node in model.graph.node if positions.name in node.input)
    kept = [attribute for attribute in node.attribute if attribute.name != "out_features"]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize("runtime", ["ort", "genai"])
def test_the_command_refuses_a_model_that_claims_two_billion_rows(
    runtime: str, two_billion_rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-m", str(two_billion_rows), "Anna", "--runtime", runtime]) == 3
    done = capfd.readouterr()
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert f"cannot open {two_billion_rows}" in done.err
    assert "is damaged: a layout, type, shape or pattern outside of the format" in done.err


def test_components_have_to_be_constant(pack: Pack) -> None:
    packed = pack("bitmask", "i8", 9, 64)
    for name in packed.arrays:
        assert f"({name}) is not an initializer" in refused(model_of([packed], dynamic=f"w0.{name}"))


def test_scales_of_another_type_are_refused(pack: Pack) -> None:
    packed = pack("bitmask", "i8", 9, 64)
    doubles = packed.arrays["scale"].astype(np.float64)
    assert "element type 11" in refused(model_of([packed], changed={"scale": doubles}))


def test_an_input_of_another_width_is_refused(pack: Pack) -> None:
    session = open_native(model_of([pack("bitmask", "i8", 9, 64)]))
    with pytest.raises(Exception, match=f"{NODE}.*is 63, expected in_features 64"):
        session.run(None, {"X": np.zeros((1, 1, 63), np.float32)})
