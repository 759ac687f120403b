"""Exported ONNX folders against torch on the decoded weights, in stock runtimes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from transformers import AutoModelForCausalLM

from losa_deploy.bindings.libraries import library_name
from losa_deploy.errors import UsageError
from losa_deploy.exporters.onnx.exporter import OnnxExporter, write_graph
from losa_deploy.exporters.onnx.graph import DenseGraph, dense_graph
from losa_deploy.exporters.onnx.plan import Job, planned, table_options
from losa_deploy.exporters.onnx.reader import decode
from losa_deploy.layouts import LAYOUTS, PackOptions, unpack
from losa_deploy.layouts.operator_names import DOMAIN
from losa_deploy.manifest import Manifest, sha256_file
from losa_deploy.model import SparseModel
from losa_deploy.progress import no_progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.ort.session import StockOrtRuntime
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from .conftest import GATED, Make, export_as

TOKENS = (5, 17, 200, 3, 44, 260, 8, 99)
STEPS = 6
TOLERANCE = 3e-6
"""Of the largest logit: f32 sums in another order."""
Masks = Mapping[str, NDArray[np.bool_]]


def torch_model(model: SparseModel, weights: Mapping[str, NDArray[np.float32]]) -> torch.nn.Module:
    """The merged model with the given weights in the place of its own."""
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    parameters = dict(loaded.named_parameters())
    for name, weight in weights.items():
        if f"{name}.weight" in parameters:
            with torch.no_grad():
                parameters[f"{name}.weight"].copy_(torch.from_numpy(weight.copy()))
    return loaded


def torch_logits(model: torch.nn.Module, tokens: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return result


def check_session(folder: Path, oracle: torch.nn.Module) -> list[int]:
    """All logits, then greedy steps through the key/value cache; returns the greedy tokens."""
    session = StockOrtRuntime().open(folder, threads=1)
    expected = torch_logits(oracle, list(TOKENS))
    scale = float(np.abs(expected).max())
    assert np.abs(session.logits(TOKENS) - expected).max() <= TOLERANCE * scale
    tokens, last = list(TOKENS), session.prefill(TOKENS)
    for _ in range(STEPS):
        expected = torch_logits(oracle, tokens)[-1]
        assert np.abs(last - expected).max() <= TOLERANCE * scale
        tokens.append(int(last.argmax()))
        last = session.step(tokens[-1])
    session.close()
    return tokens


def genai_tokens(folder: Path) -> list[int]:
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model := og.Model(str(folder)))
    length = len(TOKENS) + STEPS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([TOKENS], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def tables_of(job: Job) -> dict[str, NDArray[np.float32]]:
    """Embedding and head as the head's value type rounds them."""
    result = {}
    for name, (tensor, shape) in job.other.items():
        packed = LAYOUTS["dense"].pack(
            job.checkpoint.array(tensor), np.ones(shape, np.bool_), table_options(job.recipe)
        )
        result[name] = unpack(packed).weight
    return result


@pytest.fixture(scope="module")
def llama_graph(merged_llama: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DenseGraph]:
    """The builder's graph of the merged Llama, made once."""
    with dense_graph(merged_llama.checkpoint, tmp_path_factory.mktemp("graph")) as graph:
        yield graph


def one_of_four(model: SparseModel) -> Masks:
    masks = {}
    for name in model.linears:
        mask = np.zeros(model.linears[name], np.bool_)
        mask[:, 1::4] = True
        masks[name] = mask
    return masks


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm"])
def test_llama_equals_torch_on_the_decoded_weights(
    merged_llama: SparseModel, llama_graph: DenseGraph, tmp_path: Path, layout: str, value_type: str
) -> None:
    masks = one_of_four(merged_llama)
    recipe = ExportRecipe.model_validate(
        {
            "layout": layout,
            "value_type": value_type,
            "group_size": 32,
            "head": "i4" if layout == "nm" else "same",
        }
    )
    job = Job(merged_llama.checkpoint, recipe, masks.__getitem__ if layout == "nm" else merged_llama.mask)
    graph = replace(llama_graph, model=copy.deepcopy(llama_graph.model))
    packing = write_graph(job, planned(job), graph, tmp_path, {}, no_progress)
    assert {record.layout for record in packing.linears} == {layout}
    weights = {name: w for name, w in decode(tmp_path).items() if name in merged_llama.linears}
    assert set(weights) == set(merged_llama.linears)
    for record in packing.linears:
        mask = job.mask(record.name)
        options = PackOptions(value_type, 32, search=True)
        packed = LAYOUTS[layout].pack(merged_llama.weight(record.name), mask, options)
        assert record.sha256 == packed.sha256 and record.bytes == packed.nbytes
        assert np.array_equal(weights[record.name], unpack(packed).weight)
        assert not weights[record.name][~mask].any()
    check_session(tmp_path, torch_model(merged_llama, {**weights, **tables_of(job)}))


def operators(folder: Path) -> Counter[str]:
    """Operators of the graph, those of a single linear left out."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node if not node.op_type.endswith("MatMulI8"))


def test_gate_and_up_are_one_node_that_gates(
    merged_llama: SparseModel, llama_graph: DenseGraph, tmp_path: Path
) -> None:
    recipe = ExportRecipe(layout="bitmask", value_type="i8")
    job = Job(merged_llama.checkpoint, recipe, merged_llama.mask)
    graph = replace(llama_graph, model=copy.deepcopy(llama_graph.model))
    write_graph(job, planned(job), graph, tmp_path, {}, no_progress)
    found = operators(tmp_path)
    assert found["BitmaskMatMulI8x2SwiGLU"] == found["BitmaskMatMulI8x3"] == 2
    assert found["BitmaskMatMulI8x2"] == found["Sigmoid"] == 0
    assert found["Mul"] == 1, "of the embedding"


@pytest.mark.parametrize(
    "case", ["another activation", "the gate is used elsewhere", "the gate is an output"]
)
def test_other_gates_stay_in_the_graph(
    case: str, merged_llama: SparseModel, llama_graph: DenseGraph, tmp_path: Path
) -> None:
    recipe = ExportRecipe(layout="bitmask", value_type="i8")
    job = Job(merged_llama.checkpoint, recipe, merged_llama.mask)
    model = copy.deepcopy(llama_graph.model)
    activations = [node for node in model.graph.node if node.op_type == "Sigmoid"]
    gate = activations[0].input[0]
    if case == "another activation":
        activations[0].op_type = "HardSigmoid"
    elif case == "the gate is used twice":
        model.graph.node.append(onnx.helper.make_node("Abs", [gate], ["probe"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("probe", 1, None))
    else:
        model.graph.output.append(onnx.helper.make_tensor_value_info(gate, 1, None))
    write_graph(job, planned(job), replace(llama_graph, model=model), tmp_path, {}, no_progress)
    found = operators(tmp_path)
    assert found["BitmaskMatMulI8x2"] == found["BitmaskMatMulI8x2SwiGLU"] == 1
    assert found["Sigmoid"] + found["HardSigmoid"] == 1 and found["Mul"] == 2 + 1


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_tiles_equal_torch_on_the_decoded_weights(make_merged: Make, tmp_path: Path, value_type: str) -> None:
    from transformers import LlamaConfig

    model = make_merged(LlamaConfig(**{**GATED, "intermediate_size": 192}, tie_word_embeddings=True))
    masks = {name: six_of_sixteen(shape) for name, shape in model.linears.items()}
    recipe = ExportRecipe(value_type=value_type, group_size=32)
    job = Job(model.checkpoint, recipe, masks.__getitem__)
    with dense_graph(model.checkpoint, tmp_path) as graph:
        packing = write_graph(job, planned(job), graph, tmp_path, {}, no_progress)
    assert {record.layout for record in packing.linears} == {"tiled"}
    weights = {name: w for name, w in decode(tmp_path).items() if name in model.linears}
    for name, mask in masks.items():
        packed = LAYOUTS["tiled"].pack(model.weight(name), mask, PackOptions(value_type, 32, search=True))
        assert np.array_equal(weights[name], unpack(packed).weight)
    check_session(tmp_path, torch_model(model, {**weights, **tables_of(job)}))


def six_of_sixteen(shape: tuple[int, int]) -> NDArray[np.bool_]:
    order = np.random.default_rng(shape[0]).random((shape[0], shape[1] // 16, 16)).argsort(axis=2)
    return (order < 6).reshape(shape)


@pytest.fixture(scope="module")
def llama_folder(merged_llama: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-onnx")
    exported = export_as(OnnxExporter(), merged_llama, ExportRecipe(), folder)
    assert exported.files["model.onnx.data"] == (folder / "model.onnx.data").stat().st_size
    return folder


def test_folder_is_complete_and_describes_itself(merged_llama: SparseModel, llama_folder: Path) -> None:
    names = {path.name for path in llama_folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} <= names
    assert {"losa.json", "export.log", "generation_config.json"} <= names
    assert not list(llama_folder.parent.glob(f".{llama_folder.name}.*"))
    manifest = Manifest.read(llama_folder)
    assert (manifest.kind, manifest.format, manifest.source.revision) == ("exported", "onnx", "0123abc")
    assert [record.name for record in manifest.linears] == list(merged_llama.linears)
    assert [record.name for record in manifest.other_tensors] == ["model.embed_tokens"]
    for name, digest in manifest.files.items():
        assert sha256_file(llama_folder / name) == digest
    model = onnx.load(llama_folder / "model.onnx", load_external_data=False)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["losa.source"] == "test/random" and properties["losa.schema"] == "losa.manifest/1"
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries.get("location", "model.onnx.data") == "model.onnx.data"
        assert int(entries.get("offset", 0)) % 4096 == 0
    tables = [t for t in model.graph.initializer if t.name.startswith("model.embed_tokens.values")]
    users = [node for node in model.graph.node if tables[0].name in node.input]
    assert {node.op_type for node in users} == {"Gather", "DenseMatMulI8"}  # one table for both


def test_runtimes_agree_on_greedy_tokens(merged_llama: SparseModel, llama_folder: Path) -> None:
    weights = OnnxExporter().decode(llama_folder)
    assert check_session(llama_folder, torch_model(merged_llama, weights)) == genai_tokens(llama_folder)


@pytest.mark.usefixtures("cold_graphs")
def test_same_input_gives_the_same_bytes(
    merged_llama: SparseModel, llama_folder: Path, tmp_path: Path
) -> None:
    export_as(OnnxExporter(), merged_llama, ExportRecipe(), tmp_path)
    assert Manifest.read(tmp_path).files == Manifest.read(llama_folder).files


def test_plan_tells_what_export_writes(merged_llama: SparseModel, llama_folder: Path) -> None:
    plan = OnnxExporter().plan(merged_llama, ExportRecipe())
    manifest = Manifest.read(llama_folder)
    records = (*manifest.linears, *manifest.other_tensors)
    for tensor, record in zip(plan.tensors, records, strict=True):
        assert (tensor.name, tensor.layout, tensor.bytes) == (record.name, record.layout, record.bytes)
        assert (tensor.value_type, tensor.nnz, tensor.reason) == (
            record.value_type,
            record.nnz,
            record.reason,
        )


@pytest.mark.parametrize("family", ["merged_qwen2", "merged_qwen3", "merged_opt"])
def test_other_families(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: SparseModel = request.getfixturevalue(family)
    exporter = OnnxExporter()
    export_as(exporter, model, ExportRecipe(), tmp_path)
    weights = exporter.decode(tmp_path)
    untied = {"lm_head"} if family == "merged_qwen2" else set()
    assert set(weights) == {*model.linears, model.family.embedding, *untied}
    assert check_session(tmp_path, torch_model(model, weights)) == genai_tokens(tmp_path)


@pytest.mark.parametrize("family", ["merged_llama", "merged_qwen2", "merged_opt"])
@pytest.mark.parametrize("value_type", ["i4", "f32"])
def test_dense_baseline_is_the_source_in_the_graph_of_the_artifact(
    family: str, value_type: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Tied and untied heads, both graph sources, packed and plain nodes; the masks do not matter."""
    model: SparseModel = request.getfixturevalue(family)
    exported, dense = tmp_path / "exported", tmp_path / "dense"
    for folder in (exported, dense):
        folder.mkdir()
    exporter, recipe = OnnxExporter(), ExportRecipe(value_type=value_type, bundle_runtime=True)
    export_as(exporter, model, recipe, exported)
    source = _rescaled(model.checkpoint, tmp_path / "source")
    exporter.export_dense(source, exported, dense, no_progress)
    graph = onnx.load(dense / "model.onnx", load_external_data=False).graph
    assert not [node for node in graph.node if node.domain == DOMAIN]
    assert "custom_ops_library" not in (dense / "genai_config.json").read_text()
    check_session(dense, AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32))


def _rescaled(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same model with other weights in its block linears."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    with torch.no_grad():
        for name in checkpoint.linears:
            model.get_submodule(name).weight.mul_(1.5)
    model.save_pretrained(folder)
    copy_side_files(checkpoint.folder, folder)
    return Checkpoint.open(folder)


def test_bundled_operators_are_found_by_genai_alone(merged_llama: SparseModel, tmp_path: Path) -> None:
    """The folder names its own library: onnxruntime-genai runs the kernels without this package."""
    recipe = ExportRecipe(value_type="f32", bundle_runtime=True)
    exported = export_as(OnnxExporter(), merged_llama, recipe, tmp_path)
    assert library_name() in exported.files
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == library_name()
    assert genai_tokens(tmp_path) == check_session(tmp_path, torch_model(merged_llama, {}))


def test_nm_layout_is_refused_for_other_masks_before_any_work(merged_llama: SparseModel) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        OnnxExporter().plan(merged_llama, ExportRecipe(layout="nm"))


def reference_logits(folder: Path, tokens: list[int], heads: int, size: int) -> NDArray[np.float32]:
    """Logits of a graph of standard operators, as the ONNX reference evaluates them."""
    model = onnx.load(folder / "model.onnx")
    assert {i.domain for i in model.opset_import} <= {"", DOMAIN}
    feeds = {
        value.name: np.zeros((1, heads, 0, size), np.float32)
        for value in model.graph.input
        if value.name.startswith("past_key_values")
    }
    feeds["input_ids"] = np.array([tokens], np.int64)
    feeds["attention_mask"] = np.ones((1, len(tokens)), np.int64)
    result: NDArray[np.float32] = ReferenceEvaluator(model).run(["logits"], feeds)[0][0]
    return result


def test_standard_operators_only_and_the_reference_evaluator(
    merged_llama: SparseModel, tmp_path: Path
) -> None:
    """The plain graph, traced once: portable, and packed with nothing but our functions added."""
    for name in ("packed", "portable"):
        (tmp_path / name).mkdir()
    with dense_graph(merged_llama.checkpoint, tmp_path / "packed", plain=True) as graph:
        original = copy.deepcopy(graph.model)
        packed = Job(merged_llama.checkpoint, ExportRecipe(), merged_llama.mask)
        write_graph(packed, planned(packed), graph, tmp_path / "packed", {}, no_progress)
        portable = Job(merged_llama.checkpoint, ExportRecipe(portable=True), merged_llama.mask)
        plain = replace(graph, model=original)
        write_graph(portable, planned(portable), plain, tmp_path / "portable", {}, no_progress)
    config = json.loads((tmp_path / "packed" / "genai_config.json").read_text())["model"]["decoder"]
    heads, size = config["num_key_value_heads"], config["head_size"]
    weights = decode(tmp_path / "packed")
    for folder, values in (("packed", {**weights, **tables_of(packed)}), ("portable", {})):
        oracle = torch_model(merged_llama, values)
        check_session(tmp_path / folder, oracle)
        expected = torch_logits(oracle, list(TOKENS))
        got = reference_logits(tmp_path / folder, list(TOKENS), heads, size)
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
    graph_model = onnx.load(tmp_path / "portable" / "model.onnx", load_external_data=False)
    assert {node.domain for node in graph_model.graph.node} == {""} and not graph_model.functions
