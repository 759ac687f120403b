"""Merged folders of small random models of each family, as the exporters get them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from losa_deploy.interfaces import ExportedModel, Exporter
from losa_deploy.layouts import LAYOUTS, PackedTensor, PackOptions
from losa_deploy.manifest import Manifest, SourceRecord
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask
from losa_deploy.planned import export_planned
from losa_deploy.progress import no_progress
from losa_deploy.recipe import ExportRecipe, Recipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files, write_weights

from .operators import Pack

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GATED = {**SHAPE, "intermediate_size": 172, "num_key_value_heads": 2}
Make = Callable[[object], SparseModel]
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


def with_masks(model: SparseModel, folder: Path, masks: Mapping[str, NDArray[np.bool_]]) -> SparseModel:
    """The same model under other masks."""
    shutil.copytree(model.folder, folder)
    save_file({name: pack_mask(mask) for name, mask in masks.items()}, folder / MASK_FILE)
    tensors = load_file(folder / "model.safetensors")
    for name, mask in masks.items():
        tensors[f"{name}.weight"] *= mask
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return SparseModel.open(folder)


def prune(source: Path, folder: Path) -> SparseModel:
    """Half of each row by magnitude; in every linear a kept weight is set to zero."""
    import torch

    checkpoint = Checkpoint.open(source)
    copy_side_files(source, folder)
    masks: dict[str, np.ndarray] = {}
    tensors: list[tuple[str, torch.Tensor]] = []
    for name in checkpoint.files:
        tensor, linear = checkpoint.tensor(name), name.removesuffix(".weight")
        if linear in checkpoint.linears and name.endswith(".weight"):
            order = tensor.abs().argsort(dim=1)
            mask = torch.ones_like(tensor, dtype=torch.bool)
            mask.scatter_(1, order[:, : tensor.shape[1] // 2], False)
            tensor = torch.where(mask, tensor, 0.0)
            tensor[0, int(mask[0].nonzero()[0])] = 0.0
            masks[linear] = pack_mask(mask.numpy())
        tensors.append((name, tensor))
    write_weights(folder, tensors)
    save_file(masks, folder / MASK_FILE)
    source_record = SourceRecord(id="test/random", revision="0123abc")
    Manifest(kind="merged", source=source_record, recipe=Recipe(), sparsity_achieved=0.5, linears=()).write(
        folder
    )
    return SparseModel.open(folder)


def export_as(exporter: Exporter, model: SparseModel, recipe: ExportRecipe, folder: Path) -> ExportedModel:
    """What the commands do: plan, write by the plan, compare."""
    return export_planned(exporter, model, exporter.plan(model, recipe), folder, no_progress)


@pytest.fixture(scope="session")
def make_merged(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Make:
    """A function: transformers config → merged folder of a seeded random model, with a tokenizer."""

    def make(config: object) -> SparseModel:
        import torch
        from transformers import AutoModelForCausalLM, PretrainedConfig

        assert isinstance(config, PretrainedConfig)
        dense = tmp_path_factory.mktemp("dense")
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # so large that predictions are not ties
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(str(dense))
        for path in tiny_tokenizer.iterdir():
            shutil.copy(path, dense / path.name)
        return prune(dense, tmp_path_factory.mktemp("merged"))

    return make


@pytest.fixture(scope="session")
def merged_llama(make_merged: Make) -> SparseModel:
    """Tied, 4 heads on 2 key/value heads, ff 172."""
    from transformers import LlamaConfig

    return make_merged(LlamaConfig(**GATED, tie_word_embeddings=True))


@pytest.fixture(scope="session")
def merged_qwen2(make_merged: Make) -> SparseModel:
    """Untied, biases on q, k and v, as many key/value heads as heads."""
    from transformers import Qwen2Config

    return make_merged(Qwen2Config(**{**GATED, "num_key_value_heads": 4}, tie_word_embeddings=False))


@pytest.fixture(scope="session")
def merged_qwen3(make_merged: Make) -> SparseModel:
    """Norms on q and k, heads wider than hidden / heads."""
    from transformers import Qwen3Config

    return make_merged(Qwen3Config(**GATED, head_dim=32, tie_word_embeddings=True))


@pytest.fixture(scope="session")
def merged_opt(make_merged: Make) -> SparseModel:
    """Learned positions, layer norm, biases everywhere, tied."""
    from transformers import OPTConfig

    return make_merged(OPTConfig(**SHAPE, ffn_dim=172, word_embed_proj_dim=64, pad_token_id=1))


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
        "beta_fast": 32.0,
        "rope_theta": 10000.0,
    }
    return make_merged(LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters=scaling))
