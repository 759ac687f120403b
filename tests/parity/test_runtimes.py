"""The runtimes against each other on the tiny trained model, and their refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.interfaces import Session
from losa_deploy.manifest import Manifest, SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import load_recipe
from losa_deploy.runtimes.generate import GenerateOptions, generate
from losa_deploy.runtimes.llamacpp.runtime import StockLlamaCppRuntime
from losa_deploy.runtimes.llamacpp.session import LlamaCppSession
from losa_deploy.runtimes.ort.genai import GenaiRuntime, GenaiSession
from losa_deploy.runtimes.ort.session import OrtRuntime, OrtSession
from losa_deploy.runtimes.reference import ReferenceRuntime, ReferenceSession
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.text.tokenizer import load_tokenizer

TOLERANCE = 2e-4
"""f32 sums in another order, on logits of size 10."""


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Iterator[ReferenceSession]:
    session = ReferenceRuntime().open(tiny_llama, threads=1)
    yield session
    session.close()


@pytest.fixture(scope="module")
def ort(tiny_dense_onnx: Path) -> Iterator[OrtSession]:
    session = OrtRuntime().open(tiny_dense_onnx, threads=1)
    yield session
    session.close()


@pytest.fixture(scope="module")
def unshared(
    tiny_dense_onnx: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OrtSession]:
    """The same graph without a genai_config.json, so with a cache that grows by concatenation."""
    folder = tmp_path_factory.mktemp("unshared")
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(tiny_dense_onnx / name, folder / name)
    shutil.copyfile(tiny_llama / "config.json", folder / "config.json")
    session = OrtRuntime().open(folder, threads=1)
    yield session
    session.close()


@pytest.fixture(scope="module")
def genai(tiny_dense_onnx: Path) -> Iterator[GenaiSession]:
    session = GenaiRuntime().open(tiny_dense_onnx, threads=1)
    yield session
    session.close()


@pytest.fixture(scope="module")
def tiny_dense_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a dense F32 GGUF."""
    artifact, folder = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("tiny_dense_gguf")
    recipe = load_recipe(overrides=[("export.value_type", "f32")])
    source = SourceRecord(id="someone/tiny")
    Manifest(kind="exported", source=source, recipe=recipe, sparsity_achieved=0.0, linears=()).write(artifact)
    GgufExporter().export_dense(Checkpoint.open(tiny_llama), artifact, folder, no_progress)
    return folder


@pytest.fixture(scope="module")
def llamacpp(tiny_dense_gguf: Path) -> Iterator[LlamaCppSession]:
    session = StockLlamaCppRuntime().open(tiny_dense_gguf, threads=1)
    yield session
    session.close()


@pytest.fixture(params=["reference", "ort", "unshared", "genai", "llamacpp"])
def session(request: pytest.FixtureRequest) -> Session:
    chosen: Session = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="module")
def tokens(tiny_llama: Path, tiny_text: str) -> list[int]:
    return load_tokenizer(tiny_llama).encode(tiny_text[:100])[:40]


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def test_logits_agree_with_the_reference(
    session: Session, reference: ReferenceSession, tokens: list[int]
) -> None:
    logits = session.logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (len(tokens), session.vocab_size)
    assert largest(logits, reference.logits(tokens)) < TOLERANCE


def test_the_model_is_trained(reference: ReferenceSession, tiny_llama: Path, tiny_text: str) -> None:
    """Without this, agreement of greedy tokens would be luck."""
    tokens = load_tokenizer(tiny_llama).encode(tiny_text[:1000])[:256]
    hits = reference.logits(tokens)[:-1].argmax(-1) == tokens[1:]
    assert hits.mean() > 0.85


def test_steps_equal_the_full_sequence(session: Session, tokens: list[int]) -> None:
    full = session.logits(tokens)
    assert largest(session.prefill(tokens[:5]), full[4]) < TOLERANCE
    for position in range(5, len(tokens)):
        assert largest(session.step(tokens[position]), full[position]) < TOLERANCE


def test_prefill_starts_afresh_and_logits_leave_no_trace(session: Session, tokens: list[int]) -> None:
    first = session.prefill(tokens[:9]).copy()
    session.step(tokens[20])
    session.logits(tokens[10:])
    assert largest(session.prefill(tokens[:9]), first) < TOLERANCE


def test_returned_logits_are_not_overwritten(session: Session, tokens: list[int]) -> None:
    first = session.prefill(tokens[:4])
    kept = first.copy()
    session.step(tokens[4])
    assert np.array_equal(first, kept)


def test_to_the_end_of_the_context(session: Session, reference: ReferenceSession, tokens: list[int]) -> None:
    """256 tokens: past the first cache buffers, then a refusal with the number."""
    assert session.context_length == 256
    long = (tokens * 7)[:256]
    full = reference.logits(long)
    session.prefill(long[:200])
    for position in range(200, 256):
        last = session.step(long[position])
    assert largest(last, full[-1]) < TOLERANCE
    with pytest.raises(InputError, match="holds 256"):
        session.step(long[0])


def test_the_same_greedy_tokens_everywhere(
    reference: ReferenceSession,
    ort: OrtSession,
    unshared: OrtSession,
    genai: GenaiSession,
    llamacpp: LlamaCppSession,
    tokens: list[int],
) -> None:
    options = GenerateOptions(max_tokens=60)
    expected = list(generate(reference, tokens[:12], options))
    assert len(set(expected)) > 10
    for other in (ort, unshared, genai, llamacpp):
        assert list(generate(other, tokens[:12], options)) == expected
    assert list(genai.greedy(tokens[:12], 60)) == expected


def test_bad_tokens_are_refused(session: Session) -> None:
    for bad in ([], [1, 300], [-1], [5] * 257):
        with pytest.raises(InputError):
            session.logits(bad)
        with pytest.raises(InputError):
            session.prefill(bad)


def test_a_step_needs_a_prefill(session: Session, tokens: list[int]) -> None:
    session.logits(tokens)
    with pytest.raises(RuntimeError, match="prefill"):
        session.step(1)


def test_a_growing_buffer_keeps_the_sequence(ort: OrtSession, tokens: list[int]) -> None:
    """Three doublings of a buffer that starts small give what one large buffer gives."""
    from losa_deploy.runtimes.ort import cache

    full = ort.logits(tokens)
    shared = cache.SharedCache(ort._graph.cache, 256)
    small = OrtSession(ort._session, ort._graph, ort._facts)
    small._cache = shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SMALLEST_BUFFER", 4)
        small.prefill(tokens[:3])
        capacities = {shared.capacity}
        for position in range(3, len(tokens)):
            assert largest(small.step(tokens[position]), full[position]) < TOLERANCE
            capacities.add(shared.capacity)
    assert capacities == {4, 8, 16, 32, 64}


def cut_data(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def cut_graph(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])


@pytest.mark.parametrize("runtime", [OrtRuntime(), GenaiRuntime()], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "no model.onnx"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "model.onnx.data"),
        (cut_data, "cannot open"),
        (cut_graph, "cannot open"),
    ],
    ids=["no graph", "no data", "half the data", "part of the graph"],
)
def test_a_damaged_folder_is_refused(
    tiny_dense_onnx: Path,
    tmp_path: Path,
    runtime: OrtRuntime | GenaiRuntime,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dense_onnx, folder)
    damage(folder)
    with pytest.raises(InputError, match=message):
        runtime.open(folder, threads=1)


def test_a_graph_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(InputError, match="no 'input_ids'"):
        OrtRuntime().open(tmp_path, threads=1)


def test_what_each_runtime_supports(
    tiny_llama: Path, tiny_dense_onnx: Path, tiny_dense_gguf: Path, tmp_path: Path
) -> None:
    for folder in (tiny_llama, tiny_dense_onnx, tmp_path):
        assert not StockLlamaCppRuntime().supports(folder)
    for path in (tiny_dense_gguf, *tiny_dense_gguf.glob("*.gguf")):
        assert StockLlamaCppRuntime().supports(path)
    assert ReferenceRuntime().supports(tiny_llama) and not ReferenceRuntime().supports(tiny_dense_onnx)
    for runtime in (OrtRuntime(), GenaiRuntime()):
        assert runtime.supports(tiny_dense_onnx) and not runtime.supports(tiny_llama)
        assert not runtime.supports(tmp_path)


def test_options_can_be_configured_before_loading(tiny_dense_onnx: Path) -> None:
    seen = []
    runtime = OrtRuntime(configure=[lambda options: seen.append(options.intra_op_num_threads)])
    runtime.open(tiny_dense_onnx, threads=3).close()
    assert seen == [3]


def test_a_damaged_config_is_refused(tiny_dense_onnx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dense_onnx, folder)
    config = json.dumps({"model": {}})[:-2]
    (folder / "genai_config.json").write_text(config)
    with pytest.raises(InputError, match=r"genai_config\.json"):
        OrtRuntime().open(folder, threads=1)


@pytest.mark.parametrize("runtime", [OrtRuntime(), StockLlamaCppRuntime()], ids=lambda r: r.name)
def test_a_closed_session_says_so(
    runtime: OrtRuntime | StockLlamaCppRuntime,
    tiny_dense_onnx: Path,
    tiny_dense_gguf: Path,
    tokens: list[int],
) -> None:
    session = runtime.open(tiny_dense_onnx if runtime.name == "ort" else tiny_dense_gguf, threads=1)
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.logits(tokens)


def test_a_context_grows_with_its_sequence(tiny_dense_gguf: Path, tokens: list[int]) -> None:
    """Copies of the cache into larger contexts give what one large context gives."""
    from losa_deploy.runtimes.llamacpp import session as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALLEST_CONTEXT", 4)
        small = StockLlamaCppRuntime().open(tiny_dense_gguf, threads=1)
        assert small._capacity == 4
        full = small.logits(tokens)
        small._make_room(4)
        small.prefill(tokens[:3])
        capacities = {small._capacity}
        for position in range(3, len(tokens)):
            assert largest(small.step(tokens[position]), full[position]) < TOLERANCE
            capacities.add(small._capacity)
        small.close()
    assert capacities == {4, 8, 16, 32, 64}


def test_steps_of_an_opt_model(tmp_path: Path) -> None:
    """Learned positions, which the model counts itself: a step must not start again at 0."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=90,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(str(tmp_path))
    session = ReferenceRuntime().open(tmp_path, threads=1)
    tokens = [5, 9, 9, 9, 30, 9, 9, 2]
    full = session.logits(tokens)
    assert largest(full[2:3], full[3:4]) > 1e-3
    assert largest(session.prefill(tokens[:3]), full[2]) < TOLERANCE
    for position in range(3, len(tokens)):
        assert largest(session.step(tokens[position]), full[position]) < TOLERANCE
