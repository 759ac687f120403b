"""The merge: exact zeros, the proof, and a proof that fails when it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa_deploy.compress.adapted import AdaptedModel, step_folder
from losa_deploy.compress.schedule import compress
from losa_deploy.errors import GateError
from losa_deploy.manifest import Manifest, SourceRecord, sha256_file
from losa_deploy.merge import merge
from losa_deploy.model import SparseModel, pack_mask, unpack_mask
from losa_deploy.progress import no_progress
from losa_deploy.recipe import load_recipe
from losa_deploy.sources.checkpoint import Checkpoint


def compressed(source: Path, out: Path, **changes: object) -> AdaptedModel:
    values: dict[str, object] = {
        "calibration.samples": 8,
        "calibration.sequence_length": 32,
        "allocation.samples": 8,
        "schedule.steps": 2,
        "adapt.mode": "adapters",
        "adapt.steps": 5,
        "adapt.batch_size": 4,
        "adapt.learning_rate": 0.01,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    chosen = load_recipe(overrides=values.items())
    return compress(Checkpoint.open(source), SourceRecord(id="tiny"), chosen, out, progress=no_progress)


def merged(source: Path, adapted: AdaptedModel, out: Path) -> SparseModel:
    out.mkdir()
    return merge(Checkpoint.open(source), adapted, out, progress=no_progress)


@pytest.mark.parametrize("dtype", ["source", "f16", "bf16"])
def test_merged_folder_has_exact_zeros_and_opens_in_transformers(
    tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    adapted = compressed(tiny_llama, tmp_path / "adapted", merge__dtype=dtype)
    model = merged(tiny_llama, adapted, tmp_path / "merged")
    proof = model.manifest.merge_proof
    assert proof is not None and proof.ok and proof.support_equal
    assert (proof.cast_error == 0) == (dtype == "source")
    limit = {"source": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    assert proof.cast_error <= limit
    loaded = AutoModelForCausalLM.from_pretrained(model.folder)
    for name, linear in {k: v for b in range(3) for k, v in adapted.block(b).items()}.items():
        weight = loaded.get_submodule(name).weight
        assert bool((weight[~linear.mask] == 0).all())
        assert torch.equal(torch.from_numpy(model.mask(name)), linear.mask)
        assert torch.equal(weight, linear.merged().to(weight.dtype))


def test_everything_else_is_copied_unchanged(tiny_llama: Path, tmp_path: Path) -> None:
    model = merged(tiny_llama, compressed(tiny_llama, tmp_path / "adapted"), tmp_path / "merged")
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(model.folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.removesuffix(".weight") not in model.linears:
            assert torch.equal(tensor, after[name])
    assert (model.folder / "config.json").read_text() == (tiny_llama / "config.json").read_text()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_trained_norms_and_biases_are_merged(
    kind: str, tiny_llama: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    """Every norm, the last one too, and the biases of linears; what no phase trains is the source's."""
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    source = tiny_llama
    if kind == "opt":
        source = tmp_path / "opt"
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1, init_std=0.2,
        )  # fmt: skip
        OPTForCausalLM(config).save_pretrained(str(source))
        PreTrainedTokenizerFast.from_pretrained(str(tiny_tokenizer)).save_pretrained(str(source))
    phases = [
        {"train": ["weights", "norms"], "where": "blocks", "tokens": 256, "batch_size": 4},
        {"train": ["norms"], "where": "model", "tokens": 512, "batch_size": 4, "learning_rate": 0.05},
    ]
    values = {"calibration.samples": 8, "calibration.sequence_length": 32, "phases": phases}
    chosen = load_recipe(overrides=values.items())
    adapted = compress(
        Checkpoint.open(source), SourceRecord(id="x"), chosen, tmp_path / "adapted", progress=no_progress
    )
    model = merged(source, adapted, tmp_path / "merged")
    assert model.manifest.merge_proof is not None and model.manifest.merge_proof.ok
    before, after = load_file(source / "model.safetensors"), load_file(model.folder / "model.safetensors")
    trained = {name for name in before if "norm" in name or (name.endswith(".bias") and "layers" in name)}
    assert trained == set(adapted.rest()), "by the names of the checkpoint"
    for name, tensor in before.items():
        if name in trained:
            assert torch.equal(after[name], adapted.rest()[name])
        elif name.removesuffix(".weight") not in model.linears:
            assert torch.equal(after[name], tensor)
    # A key's bias adds the same to all scores of a query, so that nothing pulls at it.
    still = {name for name in trained if torch.equal(before[name], after[name])}
    assert not {name for name in still if "k_proj.bias" not in name}


def test_a_kept_weight_that_is_zero_stays_kept(tiny_llama: Path, tmp_path: Path) -> None:
    """Law 1: the mask is data, never `weight != 0`."""
    adapted = compressed(tiny_llama, tmp_path / "adapted", adapt__mode="none")
    path = step_folder(adapted.folder, 2) / "block-00000.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj"
    shape = (64, 64)
    mask = unpack_mask(tensors[f"{name}.mask"].numpy(), shape)
    row, column = (int(i) for i in torch.from_numpy(mask).nonzero()[5])
    tensors[f"{name}.weight"][row, column] = 0.0
    save_file(tensors, path)
    model = merged(tiny_llama, adapted, tmp_path / "merged")
    assert model.mask(name)[row, column]
    assert model.weight(name)[row, column] == 0.0
    proof = model.manifest.merge_proof
    assert proof is not None and proof.kept_zeros == 1


def test_proof_catches_a_merge_that_loses_the_adapter(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = compressed(tiny_llama, tmp_path / "adapted")
    from losa_deploy.compress.adapted import AdaptedLinear

    monkeypatch.setattr(AdaptedLinear, "merged", lambda self: torch.where(self.mask, self.weight, 0.0))
    with pytest.raises(GateError, match="logits differ"):
        merged(tiny_llama, adapted, tmp_path / "merged")
    proof = Manifest.read(tmp_path / "merged").merge_proof
    assert proof is not None and not proof.ok and proof.support_equal


def test_proof_catches_a_negative_zero_outside_the_mask(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = compressed(tiny_llama, tmp_path / "adapted", adapt__mode="none")
    from losa_deploy.compress.adapted import AdaptedLinear

    monkeypatch.setattr(AdaptedLinear, "merged", lambda self: torch.where(self.mask, self.weight, -0.0))
    with pytest.raises(GateError, match="support equal False"):
        merged(tiny_llama, adapted, tmp_path / "merged")


def test_same_input_gives_equal_files(tiny_llama: Path, tmp_path: Path) -> None:
    adapted = compressed(tiny_llama, tmp_path / "adapted")
    first, second = (merged(tiny_llama, adapted, tmp_path / n) for n in ("a", "b"))
    assert first.manifest == second.manifest
    assert sha256_file(first.folder / "model.safetensors") == sha256_file(second.folder / "model.safetensors")


def test_mask_bits_are_row_major_lowest_bit_first() -> None:
    import numpy as np

    mask = np.zeros((2, 5), np.bool_)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True
    bits = pack_mask(mask)
    assert bits.tolist() == [0b00001001, 0b00000010]
    assert (unpack_mask(bits, (2, 5)) == mask).all()
