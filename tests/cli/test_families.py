"""Every kind of decoder through the whole path: compress, merge, export, verify, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from losa_deploy.cli.main import main

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED = {**SHAPE, "intermediate_size": 172}
CONFIGS = {
    "opt-tied": ("OPTConfig", {**SHAPE, "ffn_dim": 172, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "qwen2-untied-all-heads": (
        "Qwen2Config",
        {**GATED, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "qwen3-tied-grouped": (
        "Qwen3Config",
        {**GATED, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "mistral-untied-grouped-windowed": (
        "MistralConfig",
        {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": False, "sliding_window": 24},
    ),
    "smollm3-tied-by-default-every-fourth-without-positions": (
        "SmolLM3Config",
        {**GATED, "num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": None},
    ),
    "llama-yarn": (
        "LlamaConfig",
        {
            **GATED,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
FLAGS = ["--samples", "8", "--sequence-length", "32", "--steps", "2", "--adapt-steps", "3", "--offline"]
FLAGS += ["--text-tokens", "200", "--window", "100", "--threads", "1", "--quiet"]


@pytest.fixture(params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Hugging Face folder of a small random model with a tokenizer."""
    import torch
    import transformers

    kind, values = CONFIGS[request.param]
    folder = tmp_path / request.param
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))
        for parameter in model.parameters():  # so large that predictions are not ties
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    for path in tiny_tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    return folder


def test_whole_path(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "out"
    assert main(["compress-and-export", "-m", str(dense), "-f", "onnx", "-o", str(output), *FLAGS]) == 0
    report = json.loads((output / "report.json").read_text("utf-8"))
    assert report["merge_proof"]["ok"]
    assert report["parity"]["ok"]
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    manifest = json.loads((output / "losa.json").read_text("utf-8"))
    assert {entry["layout"] for entry in manifest["linears"]} == {"bitmask"}


@pytest.mark.parametrize("dense", ["mistral-untied-grouped-windowed"], indirect=True)
def test_gguf_refuses_a_window_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "out"
    assert main(["compress-and-export", "-m", str(dense), "-f", "gguf", "-o", str(output), *FLAGS]) == 3
    assert "sliding_window of 24 tokens" in capsys.readouterr().err
    assert not output.exists()
    assert not (tmp_path / "out.work" / "adapted").exists()
