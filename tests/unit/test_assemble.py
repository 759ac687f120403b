"""What a checkpoint must hold for its configuration, and the model that is made of its tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from losa_deploy.assemble import assemble, check_tensors
from losa_deploy.compress import check
from losa_deploy.compress.check import check_unpruned
from losa_deploy.errors import InputError
from losa_deploy.pretrained import load_model
from losa_deploy.sources.checkpoint import Checkpoint

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
WEIGHTS = "model.safetensors"


def make(folder: Path, kind: str, **values: object) -> Path:
    """A folder with a random model of the configuration class `kind`."""
    import transformers

    config = getattr(transformers, kind)(**{**SHAPE, **values})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(folder))
    return folder


def edit(folder: Path, *drop: str, **values: object) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **values}))


def store(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors; None removes one."""
    tensors = load_file(folder / WEIGHTS) | {n: t for n, t in changes.items() if t is not None}
    kept = {name: t.contiguous() for name, t in tensors.items() if changes.get(name, t) is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_llama` (3 blocks, tied head)."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


GATED = {"intermediate_size": 96, "num_key_value_heads": 2}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1}


@pytest.mark.parametrize(("kind", "values"), [("SmolLM3Config", GATED), ("OPTConfig", OPT)])
def test_a_head_tied_by_the_default_of_its_class_is_tied(
    kind: str, values: dict[str, object], tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", kind, **values)
    edit(folder, "tie_word_embeddings")
    checkpoint = Checkpoint.open(folder)
    check_tensors(checkpoint)
    assert checkpoint.tied
    assert "lm_head.weight" not in checkpoint
    model = assemble(checkpoint)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = torch.arange(10, 40)[None]
    assert torch.equal(model(tokens).logits, load_model(folder)(tokens).logits)


def test_an_untied_model_without_a_head_is_refused(model: Path) -> None:
    edit(model, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"has no tensor 'lm_head\.weight'"):
        check_tensors(Checkpoint.open(model))


def test_a_head_of_its_own_stays_one_although_the_configuration_ties_it(model: Path) -> None:
    embedding = load_file(model / WEIGHTS)["model.embed_tokens.weight"]
    store(model, {"lm_head.weight": embedding + 1.0})
    checkpoint = Checkpoint.open(model)
    check_tensors(checkpoint)
    assert not checkpoint.tied
    tokens = torch.arange(10, 40)[None]
    assert torch.equal(assemble(checkpoint)(tokens).logits, load_model(model)(tokens).logits)
    store(model, {"lm_head.weight": embedding})
    assert Checkpoint.open(model).tied


def test_numbers_of_blocks_that_disagree_are_both_named(model: Path) -> None:
    for blocks in (2, 4, 10**6):
        edit(model, num_hidden_layers=blocks)
        with pytest.raises(InputError, match=f"weights for 3 blocks, but config.json asks for {blocks} "):
            check_tensors(Checkpoint.open(model))


def test_another_shape_is_refused_with_both_shapes(model: Path) -> None:
    edit(model, vocab_size=280)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight as 300 x 64, .* asks for 280 x 64"):
        check_tensors(Checkpoint.open(model))


@pytest.mark.parametrize("kind", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_a_type_that_is_not_exact_in_f32_is_refused(model: Path, kind: torch.dtype) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    store(model, {name: load_file(model / WEIGHTS)[name].to(kind)})
    with pytest.raises(InputError, match=rf"holds {name} as \w+, expected one of F32, F16, BF16"):
        check_tensors(Checkpoint.open(model))


def test_quantized_weights_are_refused(model: Path) -> None:
    edit(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(InputError, match="holds quantized weights"):
        check_tensors(Checkpoint.open(model))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(model: Path, value: float) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    tensor = load_file(model / WEIGHTS)[name]
    tensor[3, 4] = value
    store(model, {name: tensor})
    checkpoint = Checkpoint.open(model)
    check_tensors(checkpoint)
    with pytest.raises(InputError, match=f"has 1 values in {name} that are NaN or infinite"):
        assemble(checkpoint)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "no such function"}]
)
def test_a_configuration_that_no_model_can_be_made_of_is_refused(
    model: Path, values: dict[str, object]
) -> None:
    edit(model, **values)
    with pytest.raises(InputError, match=r"config\.json"):
        check_tensors(Checkpoint.open(model))


@pytest.mark.parametrize(
    ("parameters", "memory", "whole"),
    [(135_000_000, 10**11, True), (135_000_000, 900_000_000, False), (1_100_000_000, 10**11, False)],
)
def test_comparing_a_model_is_not_what_needs_most_memory(parameters: int, memory: int, whole: bool) -> None:
    assert check.is_whole(parameters, memory) == whole


@pytest.mark.parametrize("memory", [10**11, 1])
@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("LlamaConfig", GATED),
        ("Qwen2Config", {**GATED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("SmolLM3Config", {**GATED, "num_hidden_layers": 4}),
        ("OPTConfig", OPT),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_is_not_the_one_of_transformers_is_refused(
    kind: str, values: dict[str, object], memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks, or the first two from a copy where the whole does not fit into memory."""
    source = Checkpoint.open(make(tmp_path / "model", kind, **{"num_hidden_layers": 3, **values}))
    place, blocks = tmp_path / "place", []

    def other(folder: Path) -> PreTrainedModel:
        model = load_model(folder)
        blocks.append(model.config.num_hidden_layers)
        if broken:
            norm = model.get_parameter(f"{source.family.final_norm}.weight")
            norm.data[0] += 0.01
        return model

    monkeypatch.setattr(check, "load_model", other)
    broken = False
    check_unpruned(source, place, memory)
    broken = True
    with pytest.raises(InputError, match="are not the model that transformers loads"):
        check_unpruned(source, place, memory)
    assert blocks == [2 if memory == 1 else source.block_count] * 2
    assert not place.exists() or not list(place.iterdir())
