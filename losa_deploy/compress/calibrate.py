"""Calibration tokens: sampled from the dense model itself, or windows of the user's text."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.precision import uses_bf16
from losa_deploy.compress.seeds import generator
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Progress
from losa_deploy.recipe import CalibrationRecipe

if TYPE_CHECKING:
    from losa_deploy.text import Tokenizer

SAMPLING_BATCH = 64


def sampled_tokens(
    dense: Decoder,
    recipe: CalibrationRecipe,
    starts: Sequence[Sequence[int]],
    seed: int,
    precision: str,
    progress: Progress,
) -> Tensor:
    """Text the dense model writes itself, [samples, sequence_length] int64; no data needed.

    Sequence i continues `starts[i % len(starts)]`, sampled at `recipe.temperature` (Liu et al. 2023,
    LLM-QAT, arXiv 2305.17888, use the same source for quantization-aware training). Without starts the
    first token is uniform over the vocabulary.
    """
    draw = generator(seed, "calibration")
    vocabulary = int(dense.logits(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    length = recipe.sequence_length
    drawn = torch.randint(vocabulary, (recipe.samples,), generator=draw).tolist()
    given = [list(starts[i % len(starts)])[:length] if starts else [drawn[i]] for i in range(recipe.samples)]
    # A copy in bf16 is read twice as fast, and so are its keys and values.
    model = copy.deepcopy(dense.model).to(torch.bfloat16) if uses_bf16(precision) else dense.model
    parts = []
    total = length * -(-recipe.samples // SAMPLING_BATCH)
    for start in range(0, recipe.samples, SAMPLING_BATCH):
        done = length * (start // SAMPLING_BATCH)
        batch = given[start : start + SAMPLING_BATCH]
        parts.append(_continue(model, batch, recipe, draw, progress, done, total))
    return torch.cat(parts)


@torch.no_grad()
def _continue(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    recipe: CalibrationRecipe,
    draw: torch.Generator,
    progress: Progress,
    done: int,
    total: int,
) -> Tensor:
    """Extend starts of any lengths to [batch, sequence_length] by ancestral sampling.

    All sequences go on together: while one still has tokens of its start, these are taken.
    """
    result = torch.zeros(len(starts), recipe.sequence_length, dtype=torch.int64)
    lengths = torch.tensor([len(start) for start in starts])
    for row, start in enumerate(starts):
        result[row, : len(start)] = torch.tensor(start)
    cache = None
    for position in range(1, recipe.sequence_length):
        output = model(input_ids=result[:, position - 1 : position], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores = output.logits[:, -1].float() / recipe.temperature
        found = draw_tokens(torch.softmax(scores, dim=-1), draw)[:, 0]
        result[:, position] = torch.where(lengths > position, result[:, position], found)
        progress(done + position + 1, total, "sampling calibration text")
    return result


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
    dense: Decoder, folder: Path, recipe: CalibrationRecipe, seed: int, precision: str, progress: Progress
) -> Tensor:
    """The calibration set [samples, sequence_length] int64 of a recipe."""
    if recipe.source != "self":
        return text_tokens(folder, Path(recipe.source), recipe.samples, recipe.sequence_length, seed)
    return sampled_tokens(dense, recipe, text_starts(folder, recipe.start), seed, precision, progress)


def text_starts(folder: Path, kind: str) -> list[list[int]]:
    """How texts of the model in `folder` begin: a plain one, a user's turn; none if nothing is known.

    A user's turn is what the chat template writes before the user's first word: the model goes on with a
    question and then its answer.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if kind == "random" or not any((folder / name).is_file() for name in names):
        return []
    from losa_deploy.text import load_tokenizer

    tokenizer = load_tokenizer(folder)
    plain = [i for i in (tokenizer.bos_id, tokenizer.separator_id) if i is not None][:1]
    starts = [plain] if plain and kind in ("text", "mixed") else []
    turn = _user_turn(tokenizer) if kind in ("chat", "mixed") else []
    return [*starts, *([turn] if turn else [])]


def _user_turn(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a conversation up to the user's first word; empty without a usable chat template."""
    if not tokenizer.has_chat_template:
        return []
    try:
        one, other = (tokenizer.chat([{"role": "user", "content": text}]) for text in ("Why", "9"))
    except InputError:
        return []
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in same]
