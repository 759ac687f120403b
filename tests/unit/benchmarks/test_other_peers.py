"""ONNX Runtime and OpenVINO as peers of a real model: what they make of it, and what they cannot.

Where OpenVINO GenAI is not installed, LOSA_TEST_OPENVINO may name the folder it was put into.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from losa_deploy.benchmarks.gguf_peers import dense_gguf, make_peer
from losa_deploy.benchmarks.openvino.package import find_package, last_words
from losa_deploy.benchmarks.openvino.peers import OpenvinoPeers
from losa_deploy.benchmarks.openvino.runtime import OpenvinoRuntime
from losa_deploy.benchmarks.ort_peers import OrtPeers
from losa_deploy.benchmarks.peer_kinds import Material
from losa_deploy.errors import LosaError, MissingError
from losa_deploy.manifest import SourceRecord
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime, StockLlamaCppRuntime
from losa_deploy.sources.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def openvino() -> Path:
    folder = os.environ.get("LOSA_TEST_OPENVINO")
    try:
        return find_package(Path(folder) if folder else None)
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def material(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The tiny model."""
    folder = tmp_path_factory.mktemp("peers")
    dense = dense_gguf(Checkpoint.open(tiny_llama), SourceRecord(id="test/tiny"), folder)
    return made_of(tiny_llama, dense, folder)


def made_of(source: Path, dense: Path, folder: Path, package: Path | None = None) -> Material:
    runtime = LlamaCppRuntime()
    return Material(dense, lambda: Checkpoint.open(source), folder, 1, runtime, openvino_folder=package)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("ort-int4", 4), ("ort-int2", 2)])
def test_linears_have_the_bits_of_the_name(material: Material, name: str, bits: int) -> None:
    made = OrtPeers().make(name, material)
    graph = onnx.load(made.folder / "model.onnx", load_external_data=False).graph
    assert not any(node.op_type == "MatMul" for node in graph.node)
    widths = {
        node.name: next(a.i for a in node.attribute if a.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    assert {width for at, width in widths.items() if "layers" in at} == {bits}
    assert {width for at, width in widths.items() if "lm_head" in at} == {4}
    assert made.bytes == sum(path.stat().st_size for path in made.folder.glob("model.onnx*"))
    assert made.runtime.name == "ort-stock"
    before = made.folder.stat().st_mtime_ns
    assert OrtPeers().make(name, material).folder.stat().st_mtime_ns == before  # it is reused


def test_a_model_that_the_builder_does_not_know_has_no_such_peer(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    source = tmp_path / "opt"
    shutil.copytree(tiny_tokenizer, source)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    OPTForCausalLM(OPTConfig(**shape, vocab_size=300, num_attention_heads=2)).save_pretrained(str(source))
    dense = tmp_path / "dense.gguf"
    dense.touch()
    with pytest.raises(LosaError, match=r"builder cannot make it of this model: .*opt"):
        OrtPeers().make("ort-int4", made_of(source, dense, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.gguf", "opt"]


def test_openvino_is_asked_for_where_it_is_not_installed(material: Material, tmp_path: Path) -> None:
    with pytest.raises(
        MissingError, match=r"needs openvino-genai, which is not installed in .*--openvino-path DIR"
    ):
        OpenvinoPeers().make("openvino-q4_0", made_of(tmp_path, material.dense, tmp_path, tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_last_line_is_the_reason() -> None:
    assert last_words("Exception from core.cpp:84:\n[load_gguf] failed\n\n") == "[load_gguf] failed"
    assert last_words("") == "it said nothing"


def test_what_openvino_cannot_open_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('a library is missing')")
    runtime = OpenvinoRuntime(tmp_path)
    with pytest.raises(LosaError, match=r"OpenVINO ended with exit code 5 .*a library is missing"):
        runtime.open(tmp_path, threads=1)
    with pytest.raises(LosaError, match=r"exit code 5: .*a library is missing"):
        runtime.footprint(tmp_path, 1)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_openvino_computes_what_llama_cpp_computes(material: Material, openvino: Path, kind: str) -> None:
    found = made_of(material.folder, material.dense, material.folder, openvino)
    made = OpenvinoPeers().make(f"openvino-{kind}", found)
    file = make_peer(kind, material.dense, material.source, material.folder, 1)
    tokens = [int(token) for token in np.random.default_rng(0).integers(5, 300, 60)]
    stock, session = StockLlamaCppRuntime().open(file, threads=1), made.runtime.open(made.folder, threads=1)
    try:
        expected, logits = stock.logits(tokens), session.logits(tokens)
        assert logits.shape == expected.shape == (60, session.vocab_size)
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
        assert np.abs(session.prefill(tokens[:30]) - logits[29]).max() < 0.01
        steps = np.stack([session.step(token) for token in tokens[30:]])
        assert np.abs(steps - logits[30:]).max() < 0.3  # its cache is int8
    finally:
        session.close()
        stock.close()
    assert made.measure is not None and made.measure(made.folder, 1).peak_rss_bytes > 10e6


def test_a_file_that_openvino_cannot_read_is_told(openvino: Path, tmp_path: Path) -> None:
    from losa_deploy.benchmarks.openvino.package import convert

    file, folder = tmp_path / "model.gguf", tmp_path / "folder"
    file.write_bytes(b"GGUF" + bytes(60))
    folder.mkdir()
    with pytest.raises(LosaError, match=r"OpenVINO cannot read model\.gguf: ."):
        convert(openvino, file, folder)
    assert not list(folder.iterdir())
