"""A block of a random model whose inputs are correlated, as those of real models are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from losa_deploy.compress.block_pruning import input_statistics, prune_block
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.student import Student
from losa_deploy.compress.walk import Walk
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint

NewWalk = Callable[[Recipe], Walk]
PruneFirst = Callable[[Walk, torch.Tensor, int, float], None]
Stored = Callable[[Path], dict[str, torch.Tensor]]
Distance = Callable[[torch.Tensor, torch.Tensor], float]


@pytest.fixture(scope="session")
def stored() -> Stored:
    """All that a compression left in a folder, by file and name."""

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.rglob("*.safetensors"))
        return {f"{path.relative_to(folder)} {n}": t for path in files for n, t in load_file(path).items()}

    return tensors


@pytest.fixture(scope="session")
def distance() -> Distance:
    """Relative; of whole numbers and bits the share that differs."""

    def between(found: torch.Tensor, expected: torch.Tensor) -> float:
        if not expected.is_floating_point():
            return float((found != expected).float().mean())
        return float((found - expected).norm() / expected.norm().clamp_min(1e-30))

    return between


@pytest.fixture(scope="session")
def correlated_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Folder of a random Llama, 2 blocks of hidden 64; embeddings are 12 directions and a little noise."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("correlated_llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        low_rank = torch.randn(300, 12) @ torch.randn(12, 64) + 1.0 * torch.randn(300, 64)
        model.model.embed_tokens.weight.data.copy_(low_rank)
    model.save_pretrained(str(folder))
    PreTrainedTokenizerFast.from_pretrained(str(tiny_tokenizer)).save_pretrained(str(folder))
    return folder


@pytest.fixture
def new_walk(correlated_llama: Path, tmp_path: Path) -> NewWalk:
    """A function: recipe → a walk over the fresh model, every linear of which is to be pruned."""

    def make(recipe: Recipe) -> Walk:
        source = Checkpoint.open(correlated_llama)
        dense, student = Decoder(source).keep(), Student(source).keep()
        return Walk(
            student, dense, frozenset(source.linears), recipe, 1, "", no_progress, Partial(tmp_path, 1)
        )

    return make


@pytest.fixture
def prune_first() -> PruneFirst:
    """A function: prune block 0 of a walk to a rate, on windows of tokens taken in batches."""

    def prune(walk: Walk, windows: torch.Tensor, batch: int, rate: float) -> None:
        stream = walk.student.stream(windows, batch)
        prune_block(walk, 0, input_statistics(walk, 0, stream), rate, 0)

    return prune
