"""Every `ai.losa` operator run by the native library inside ONNX Runtime, against a float64 oracle."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from losa_deploy.cli.main import main
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.exporters.onnx.functions import OPSET
from losa_deploy.layouts import PackedTensor, unpack
from losa_deploy.layouts.operator_names import DOMAIN, attributes, op_type
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe

from .conftest import export_as
from .operators import (
    NODE,
    VALUE_TYPES,
    Array,
    Pack,
    activations,
    model_of,
    open_native,
    refused,
    tolerance,
)

LAYOUT_NAMES = (
    "dense", "bitmask", "nm 1:2", "nm 1:4", "nm 2:4", "nm 2:5", "nm 2:16", "nm 4:16", "nm 1:32",
)  # fmt: skip


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
