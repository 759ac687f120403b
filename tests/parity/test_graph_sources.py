"""Graph sources get a model without its large weights, and their graphs say which these are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import TorchTensor

from losa_deploy.errors import InputError
from losa_deploy.exporters.onnx.graph import DenseGraph, dense_graph
from losa_deploy.exporters.onnx.stand_ins import HollowModel, hollow_model
from losa_deploy.exporters.onnx.weights import large_weights
from losa_deploy.model import SparseModel
from losa_deploy.pretrained import load_config
from losa_deploy.sources.checkpoint import Checkpoint

PARAMETERS = 1_000_000_000
LIBRARIES = 1_500_000_000
"""Bytes that torch, transformers and the builder take at most."""


def check(graph: DenseGraph, checkpoint: Checkpoint) -> None:
    """All large weights are the checkpoint's, as it has them; nothing as large lies in the graph's files."""
    large = large_weights(checkpoint)
    assert {weight.name for weight in graph.weights.values()} == large
    initializers = {tensor.name: tensor for tensor in graph.model.graph.initializer}
    for name, weight in graph.weights.items():
        array = graph.array(initializers[name])
        expected = checkpoint.array(weight.name)
        assert array.shape == tuple(initializers[name].dims) == weight.shape
        assert np.array_equal(array, expected.T if weight.transposed else expected)
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in initializers.values())
    stored = (graph.folder / "model.onnx.data").stat().st_size
    assert stored < sum(4 * int(np.prod(checkpoint.shape(name))) for name in large) / 4


@pytest.mark.parametrize(
    ("family", "plain"), [("merged_qwen2", False), ("merged_qwen3", True), ("merged_opt", False)]
)
def test_large_weights_stay_where_they_are(
    family: str, plain: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The builder, and the tracer with and without fusions; tied and untied."""
    model: SparseModel = request.getfixturevalue(family)
    with dense_graph(model.checkpoint, tmp_path, plain=plain) as graph:
        check(graph, model.checkpoint)


@pytest.fixture
def hollow(merged_qwen2: SparseModel) -> HollowModel:
    return hollow_model(merged_qwen2.checkpoint, load_config(merged_qwen2.folder))


def graph_of(tensor: torch.Tensor) -> ir.Model:
    """A graph with one initializer and nothing else."""
    value = ir.Value(name="made", const_value=TorchTensor(tensor.detach(), name="made"))
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def test_a_hollow_model_takes_no_memory_where_it_is_hollow(
    hollow: HollowModel, merged_qwen2: SparseModel
) -> None:
    checkpoint, large = merged_qwen2.checkpoint, large_weights(merged_qwen2.checkpoint)
    for name, parameter in hollow.model.named_parameters():
        assert tuple(parameter.shape) == checkpoint.shape(name)
        if name in large:
            assert parameter.untyped_storage().nbytes() == 4 * parameter.shape[1]
        else:
            assert torch.equal(parameter, checkpoint.tensor(name))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_square_weight_is_known_from_its_transpose(
    transposed: bool, hollow: HollowModel, tmp_path: Path
) -> None:
    weight = hollow.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert weight.shape[0] == weight.shape[1]
    hollow.save(graph_of(weight.T if transposed else weight), tmp_path)
    (found,) = ir.load(tmp_path / "model.onnx").graph.initializers.values()
    assert found.const_value is not None
    assert ("losa.transposed" in found.const_value.metadata_props) is transposed


@pytest.mark.parametrize("made", ["sum", "slice", "joined", "copy"])
def test_what_is_computed_from_a_weight_is_refused(made: str, hollow: HollowModel, tmp_path: Path) -> None:
    weight = hollow.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    other = hollow.model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    tensor = {
        "sum": weight + 1.0,
        "slice": weight[1:],
        "joined": torch.cat([weight, other]),
        "copy": weight.contiguous(),
    }[made]
    with pytest.raises(InputError, match="computes made from the weights"):
        hollow.save(graph_of(tensor), tmp_path)


def hole(folder: Path) -> None:
    """A Llama of more than `PARAMETERS` zeros in bf16, whose weights are a hole in a file."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=4096, intermediate_size=40960, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    config.save_pretrained(folder)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    assert end >= 2 * PARAMETERS
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + end)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory of a child is known on POSIX only")
@pytest.mark.parametrize("source", ["build", "trace"])
def test_the_memory_of_a_graph_source_does_not_grow_with_the_model(
    source: str, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    model, target = tmp_path / "model", tmp_path / "target"
    for folder in (model, target):
        folder.mkdir()
    hole(model)
    for path in tiny_tokenizer.iterdir():
        (model / path.name).symlink_to(path)
    command = [sys.executable, "-m", f"losa_deploy.exporters.onnx.{source}", str(model), str(target)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    unit = 1 if sys.platform == "darwin" else 1024
    assert usage.ru_maxrss * unit < LIBRARIES < 2 * PARAMETERS
    assert sum(path.stat().st_size for path in target.iterdir() if path.is_file()) < 20_000_000
