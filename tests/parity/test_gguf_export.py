"""Exported GGUF files against torch, in a stock llama-cpp-python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from losa_deploy import gguf_view
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.gguf_view import find_gguf
from losa_deploy.interfaces import no_progress
from losa_deploy.layouts.base import ValueType
from losa_deploy.manifest import Manifest
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.verify import _check_weights

from .conftest import GATED, Make

TOKENS = (5, 17, 200, 3, 44, 260, 8, 99)


def llama_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] with an f32 cache and without flash attention."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    model.eval(tokens)
    found: NDArray[np.float32] = model.scores[: len(tokens)].copy()
    model.close()
    return found


def torch_logits(model: SparseModel, weights: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Logits of the merged model with the given weights in the place of its own."""
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    parameters = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[f"{name}.weight"].copy_(torch.from_numpy(weight.copy()))
        result: NDArray[np.float32] = loaded(torch.tensor([list(TOKENS)])).logits[0].numpy()
    return result


def export(model: SparseModel, folder: Path, **recipe: object) -> Path:
    """The folder of an export, checked as `verify` does."""
    folder.mkdir()
    exporter = GgufExporter()
    exporter.export(model, ExportRecipe.model_validate(recipe), folder, no_progress)
    reasons, _ = _check_weights(Manifest.read(folder), model, exporter.decode(folder))
    assert reasons == []
    return folder


@pytest.fixture(scope="session")
def merged_mistral(make_merged: Make) -> SparseModel:
    """Untied, 4 heads on 1 key/value head, heads wider than hidden / heads."""
    from transformers import MistralConfig

    config = {**GATED, "num_key_value_heads": 1, "head_dim": 32}
    return make_merged(MistralConfig(**config, tie_word_embeddings=False))


@pytest.fixture(scope="session")
def merged_biased(make_merged: Make) -> SparseModel:
    """A Llama with biases everywhere and Llama 3's rotary scaling."""
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 5000.0,
    }
    return make_merged(
        LlamaConfig(
            **GATED, attention_bias=True, mlp_bias=True, tie_word_embeddings=False, rope_parameters=scaling
        )
    )


@pytest.fixture(scope="session")
def merged_yarn(make_merged: Make) -> SparseModel:
    """A Llama whose rotary embedding is scaled by YaRN."""
    from transformers import LlamaConfig

    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    return make_merged(LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters=scaling))


@pytest.fixture(scope="session")
def merged_linear(make_merged: Make) -> SparseModel:
    """A Llama whose rotary embedding is scaled linearly."""
    from transformers import LlamaConfig

    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return make_merged(LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters=scaling))


@pytest.fixture(scope="session")
def merged_smollm3(make_merged: Make) -> SparseModel:
    """Every fourth block without rotary embedding."""
    from transformers import SmolLM3Config

    return make_merged(SmolLM3Config(**{**GATED, "num_hidden_layers": 5, "pad_token_id": 1}))


FAMILIES = ("smollm3", "llama", "mistral", "qwen2", "qwen3", "biased", "yarn", "linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_equals_torch(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: SparseModel = request.getfixturevalue(f"merged_{family}")
    folder = export(model, tmp_path / "out", value_type="f32")
    decoded = GgufExporter().decode(folder)
    assert all(np.array_equal(decoded[name], model.weight(name)) for name in model.linears)
    expected = torch_logits(model, {})
    found = llama_logits(find_gguf(folder), list(TOKENS))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("value_type", ["f16", "i8", "i4"])
def test_packed_and_portable_mean_the_decoded_weights(
    family: str, value_type: ValueType, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: SparseModel = request.getfixturevalue(f"merged_{family}")
    both = export(model, tmp_path / "both", value_type=value_type, packed=True, portable=True, group_size=32)
    packed, portable = find_gguf(both), next(p for p in both.glob("*.gguf") if "LOSA" not in p.name)
    assert packed != portable
    decoded = GgufExporter().decode(both)
    expected = torch_logits(model, decoded)
    plain = tmp_path / "plain.gguf"
    gguf_view.write_expanded(packed, plain)
    assert np.abs(llama_logits(plain, list(TOKENS)) - expected).max() <= 1e-5 * np.abs(expected).max()
    packed.unlink()  # then the portable file is the primary one
    again = GgufExporter().decode(both)
    whole_blocks = [name for name in decoded if decoded[name].shape[1] % 32 == 0]
    assert len(whole_blocks) > len(model.linears) / 2
    assert all(again[name].tobytes() == decoded[name].tobytes() for name in whole_blocks)
    rounded = llama_logits(portable, list(TOKENS))  # llama.cpp rounds activations to f16 or int8
    exact = torch_logits(model, again)
    assert np.abs(rounded - exact).max() <= 0.05 * np.abs(exact).max()
    reader = GGUFReader(portable)
    assert {t.tensor_type.name for t in reader.tensors if "attn_q.weight" in t.name} == {
        {"f16": "F16", "i8": "Q8_0", "i4": "Q4_0"}[value_type]
    }
