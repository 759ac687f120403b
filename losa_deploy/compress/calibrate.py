"""Calibration tokens: sampled from the dense model itself, or windows of the user's text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.seeds import generator
from losa_deploy.interfaces import Progress
from losa_deploy.pretrained import load_hf_tokenizer
from losa_deploy.recipe import CalibrationRecipe

SAMPLING_BATCH = 64


def sampled_tokens(
    dense: Decoder, recipe: CalibrationRecipe, special_ids: frozenset[int], seed: int, progress: Progress
) -> Tensor:
    """Text the dense model writes itself, [samples, sequence_length] int64; no data needed.

    The first token is uniform over the ordinary vocabulary, the rest is sampled at
    `recipe.temperature` (Liu et al. 2023, LLM-QAT, arXiv 2305.17888, use the same source for
    quantization-aware training). Special tokens are never drawn: they end or switch the topic.
    """
    draw = generator(seed, "calibration")
    vocabulary = int(dense.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    banned = torch.tensor(sorted(i for i in special_ids if i < vocabulary), dtype=torch.int64)
    ordinary = torch.ones(vocabulary)
    ordinary[banned] = 0.0
    parts = []
    total = recipe.sequence_length * -(-recipe.samples // SAMPLING_BATCH)
    for start in range(0, recipe.samples, SAMPLING_BATCH):
        size = min(SAMPLING_BATCH, recipe.samples - start)
        done = recipe.sequence_length * (start // SAMPLING_BATCH)
        tokens = torch.multinomial(ordinary, size, replacement=True, generator=draw)[:, None]
        parts.append(_continue(dense, tokens, recipe, banned, draw, progress, done, total))
    return torch.cat(parts)


@torch.no_grad()
def _continue(
    dense: Decoder,
    tokens: Tensor,
    recipe: CalibrationRecipe,
    banned: Tensor,
    draw: torch.Generator,
    progress: Progress,
    done: int,
    total: int,
) -> Tensor:
    """Extend `tokens` [batch, 1] to [batch, sequence_length] by ancestral sampling."""
    result = [tokens]
    cache = None
    for position in range(1, recipe.sequence_length):
        output = dense.model(input_ids=result[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        scores = output.logits[:, -1] / recipe.temperature
        scores[:, banned] = float("-inf")
        result.append(draw_tokens(torch.softmax(scores, dim=-1), draw))
        progress(done + position + 1, total, "sampling calibration text")
    return torch.cat(result, dim=1)


def draw_tokens(probabilities: Tensor, draw: torch.Generator) -> Tensor:
    """One index per row of [batch, vocabulary], [batch, 1] int64, with the row's probabilities.

    By the inverse of the distribution function, in f64: torch.multinomial draws a random number for
    every entry, which for a large vocabulary takes a tenth of the sampling time.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    uniform = torch.rand(len(cumulative), 1, generator=draw, dtype=torch.float64)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found.clamp_(max=probabilities.shape[-1] - 1)


def text_tokens(folder: Path, source: Path, samples: int, length: int, seed: int) -> Tensor:
    """Windows [samples, length] int64 of the user's text, tokenized with the model in `folder`."""
    from losa_deploy.corpus import read_documents, token_windows
    from losa_deploy.text import load_tokenizer

    windows = token_windows(load_tokenizer(folder), read_documents(source), length, samples, seed)
    return torch.from_numpy(windows)


def calibration_tokens(
    dense: Decoder, folder: Path, recipe: CalibrationRecipe, seed: int, progress: Progress
) -> Tensor:
    """The calibration set [samples, sequence_length] int64 of a recipe."""
    if recipe.source != "self":
        return text_tokens(folder, Path(recipe.source), recipe.samples, recipe.sequence_length, seed)
    return sampled_tokens(dense, recipe, _special_ids(folder), seed, progress)


def _special_ids(folder: Path) -> frozenset[int]:
    """Ids of control tokens; none if the folder has no tokenizer."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return frozenset()
    return frozenset(load_hf_tokenizer(folder).all_special_ids)
