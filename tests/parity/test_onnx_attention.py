"""Windows, blocks without rotary positions and scaled positions in ONNX, against torch far past them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from losa_deploy.attention import attention_windows, original_context
from losa_deploy.errors import InputError
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.interfaces import Runtime
from losa_deploy.manifest import Manifest, hash_files
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe, VerifyRecipe
from losa_deploy.runtimes.ort.genai import GenaiRuntime
from losa_deploy.runtimes.ort.session import OrtRuntime, StockOrtRuntime
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.text.tokenizer import load_tokenizer
from losa_deploy.verify.check import Parity, verify_export
from losa_deploy.verify.questions import BEYOND, Questions

from .conftest import GATED, Make, export_as

CONTEXT = 128
WINDOW = 24
WIDE = 64
"""More tokens than any prompt of the gate has."""
TOLERANCE = 3e-6
"""Of the largest logit: f32 sums in another order."""
FOUR = {**GATED, "num_hidden_layers": 4}
SMOLLM3 = {**FOUR, "pad_token_id": None}
RUNTIMES: dict[str, Callable[[], Runtime]] = {
    "ort": OrtRuntime,
    "ort-stock": StockOrtRuntime,
    "genai": GenaiRuntime,
}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "mistral-window": ("MistralConfig", {**GATED, "sliding_window": WINDOW}),
    "qwen2-two-of-four-windowed": (
        "Qwen2Config",
        {**FOUR, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "smollm3-tied": ("SmolLM3Config", {**SMOLLM3, "tie_word_embeddings": True}),
    "smollm3-untied-own-pattern": (
        "SmolLM3Config",
        {**SMOLLM3, "tie_word_embeddings": False, "no_rope_layers": [0, 1, 1, 0]},
    ),
    "smollm3-window-without-rope": (
        "SmolLM3Config",
        {**SMOLLM3, "use_sliding_window": True, "sliding_window": WINDOW, "no_rope_layer_interval": 2},
    ),
}
SCALINGS: dict[str, dict[str, object]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [4.0] * 8,
    },
}


def config(kind: str, values: dict[str, object]) -> object:
    import transformers

    return getattr(transformers, kind)(**values)


def scaled(kind: str, **changes: object) -> dict[str, object]:
    return {**GATED, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind], **changes}}


@pytest.fixture(scope="session")
def windowed(make_merged: Make) -> SparseModel:
    return make_merged(config("MistralConfig", {**GATED, "sliding_window": WIDE}))


def export(model: SparseModel, folder: Path, **recipe: object) -> Path:
    folder.mkdir(exist_ok=True)
    chosen = ExportRecipe.model_validate({"value_type": "f32", **recipe})
    export_as(OnnxExporter(), model, chosen, folder)
    return folder


def check(folder: Path, model: SparseModel, runtime: Runtime) -> None:
    """All positions in one pass; then greedy from inside and from beyond the window, through the cache."""
    reference = ReferenceRuntime().open(model.folder, threads=1)
    session = runtime.open(folder, threads=1)
    tokens = [int(token) for token in np.random.default_rng(5).integers(2, 300, CONTEXT)]
    expected = reference.logits(tokens)
    limit = TOLERANCE * float(np.abs(expected).max())
    assert np.abs(session.logits(tokens) - expected).max() <= limit
    for length in (5, 2 * WINDOW):
        last, row = session.prefill(tokens[:length]), reference.prefill(tokens[:length])
        for _ in range(length, CONTEXT):
            assert np.abs(last - row).max() <= limit
            token = int(row.argmax())
            assert int(last.argmax()) == token
            last, row = session.step(token), reference.step(token)
    session.close()
    reference.close()


@pytest.mark.parametrize("name", MODELS)
def test_windows_and_blocks_without_positions(name: str, make_merged: Make, tmp_path: Path) -> None:
    model = make_merged(config(*MODELS[name]))
    folder = export(model, tmp_path / "fused")
    for runtime in RUNTIMES.values():
        check(folder, model, runtime())


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_positions(kind: str, make_merged: Make, tmp_path: Path) -> None:
    model = make_merged(config("LlamaConfig", scaled(kind)))
    folder = export(model, tmp_path / "fused")
    for runtime in RUNTIMES.values():
        check(folder, model, runtime())


@pytest.mark.parametrize(
    "name",
    [
        "mistral-window",
        "dynamic",
        pytest.param("smollm3-window-without-rope", marks=pytest.mark.slow),
        pytest.param("longrope", marks=pytest.mark.slow),
    ],
)
def test_in_standard_operators(name: str, make_merged: Make, tmp_path: Path) -> None:
    kind, values = MODELS[name] if name in MODELS else ("LlamaConfig", scaled(name))
    model = make_merged(config(kind, values))
    folder = export(model, tmp_path / "portable", portable=True)
    check(folder, model, StockOrtRuntime())


def test_queries_as_many_as_tokens_are_not_taken_for_the_head(make_merged: Make, tmp_path: Path) -> None:
    heads, size = 4, 80
    values = {**GATED, "pad_token_id": None, "num_attention_heads": heads, "head_dim": size}
    model = make_merged(config("Qwen3Config", {**values, "vocab_size": heads * size}))
    check(export(model, tmp_path / "queries"), model, OrtRuntime())


def test_an_unknown_scaling_is_refused_before_any_work(windowed: SparseModel) -> None:
    checkpoint = windowed.checkpoint
    rope = {"rope_type": "spiral", "rope_theta": 1e4}
    strange = Checkpoint(checkpoint.folder, {**checkpoint.config, "rope_parameters": rope}, windowed.family)
    with pytest.raises(InputError, match="'spiral'"):
        OnnxExporter().check_source(strange, ExportRecipe())


def test_windows_and_contexts_come_from_the_class_of_the_configuration() -> None:
    """A missing key has the default of its class; a key that the class lacks means nothing."""
    two = {"num_hidden_layers": 2}
    assert attention_windows({**two, "model_type": "mistral", "max_position_embeddings": 8192}) == (
        4096,
        4096,
    )
    assert attention_windows({**two, "model_type": "mistral", "max_position_embeddings": 4096}) == (
        None,
        None,
    )
    assert attention_windows({**two, "model_type": "llama", "sliding_window": 64}) == (None, None)
    qwen2 = {**two, "model_type": "qwen2", "sliding_window": 64, "max_window_layers": 1}
    assert attention_windows(qwen2) == (None, None)
    assert attention_windows({**qwen2, "use_sliding_window": True}) == (None, 64)
    assert attention_windows({**two, "model_type": "opt"}) == (None, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert original_context({**two, "model_type": "llama", "rope_parameters": yarn}) == 512
    assert original_context({**two, "model_type": "llama"}) is None


def verified(folder: Path, model: SparseModel) -> Parity:
    recipe = VerifyRecipe(prompts=1, tokens=2, window=16)
    return verify_export(folder, model, OnnxExporter(), OrtRuntime(), recipe, threads=1)


def drop_window(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = -1


def shift_window(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i += 1


@pytest.mark.parametrize("damage", [drop_window, shift_window])
def test_the_gate_sees_a_wrong_window(
    windowed: SparseModel, tmp_path: Path, damage: Callable[[onnx.GraphProto], None]
) -> None:
    folder = export(windowed, tmp_path / "onnx")
    assert verified(folder, windowed).ok
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    damage(graph.graph)
    onnx.save(graph, folder / "model.onnx")
    Manifest.read(folder).model_copy(update={"files": hash_files(folder)}).write(folder)
    result = verified(folder, windowed)
    assert not result.ok
    assert any("logits: found a difference" in reason for reason in result.reasons)


def test_the_gate_sees_positions_that_are_not_scaled(make_merged: Make, tmp_path: Path) -> None:
    """longrope's short factors instead of the long ones, which count beyond its original context only."""
    model = make_merged(config("LlamaConfig", scaled("longrope", original_max_position_embeddings=WIDE)))
    folder = export(model, tmp_path / "onnx")
    assert verified(folder, model).ok
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    (choice,) = (node for node in graph.graph.node if any("long_inv_freq" in name for name in node.input))
    choice.input[1] = choice.input[2]
    onnx.save(graph, folder / "model.onnx")
    Manifest.read(folder).model_copy(update={"files": hash_files(folder)}).write(folder)
    assert not verified(folder, model).ok


def test_the_long_sequence_outgrows_every_window(
    windowed: SparseModel, merged_llama: SparseModel, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Anna has two cups.", "utf-8")
    tokenizer = load_tokenizer(windowed.folder)
    for text in ("builtin", str(short)):
        questions = Questions.make(windowed, VerifyRecipe(text=text), tokenizer)
        assert len(questions.long) == WIDE + BEYOND
        assert max(map(len, questions.sequences)) <= CONTEXT
        assert max(map(len, questions.prompts)) < WIDE
    assert Questions.make(merged_llama, VerifyRecipe(), tokenizer).long == ()
