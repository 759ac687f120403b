"""Linears of eight bits in a decoder: close to those of the checkpoint, wherever their weights lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.packed_linear import PackedLinear, packed_linears
from losa_deploy.sources.checkpoint import Checkpoint

TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, which are not zero."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("opt")
    model.save_pretrained(str(folder))
    return folder


def logits(folder: Path, in_memory: bool, place: Path, threads: int = 1) -> torch.Tensor:
    dense = Decoder(Checkpoint.open(folder))
    with torch.no_grad(), packed_linears(dense, in_memory, place, threads):
        found: torch.Tensor = dense.model(input_ids=TOKENS, use_cache=False).logits
    assert {type(dense.model.get_submodule(name)) for name in dense.names} == {PackedLinear}
    return found


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_logits_are_those_of_the_checkpoint_to_eight_bits(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    dense = Decoder(Checkpoint.open(folder))
    with torch.no_grad(), dense.open(*range(len(dense.blocks))):
        expected = dense.model(input_ids=TOKENS, use_cache=False).logits
    found = logits(folder, True, tmp_path)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.02
    # Values of four bits, or a linear without its bias, are at least five times as far off.
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_weights_in_a_file_give_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "new"
    assert torch.equal(logits(tiny_llama, True, place), logits(tiny_llama, False, place, threads=3))
    assert place.is_dir() and not list(place.iterdir()), "the file has no name"


def test_parameters_in_blocks_are_read_and_dropped_as_before(tiny_opt: Path, tmp_path: Path) -> None:
    """Norms and biases: what a packed linear does not hold itself."""
    dense = Decoder(Checkpoint.open(tiny_opt))
    with packed_linears(dense, True, None, 1):
        names = dense.block_parameters(0)
        assert names and not any(name.endswith("proj.weight") for name in names)
        assert any(name.endswith("q_proj.bias") for name in names)
        assert all(not dense.model.get_parameter(name).is_meta for name in names)
    assert all(dense.model.get_parameter(name).is_meta for name in names)
