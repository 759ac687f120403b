"""Calibration tokens: sampled from the dense model itself, or windows of the user's text."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losa_deploy.compress.device import HERE, Room
from losa_deploy.compress.sample import Keep, not_kept, sampled_tokens
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.errors import InputError
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import Progress
from losa_deploy.recipe import CalibrationRecipe, Recipe
from losa_deploy.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from losa_deploy.text.tokenizer import Tokenizer


def text_tokens(folder: Path, source: Path, samples: int, length: int, seed: int) -> Tensor:
    """Windows [samples, length] int64 of the user's text, tokenized with the model in `folder`."""
    from losa_deploy.text.corpus import read_documents, token_windows
    from losa_deploy.text.tokenizer import load_tokenizer

    windows = token_windows(load_tokenizer(folder), read_documents(source), length, samples, seed)
    return torch.from_numpy(windows)


def calibration_tokens(
    source: Checkpoint,
    recipe: CalibrationRecipe,
    seed: int,
    precision: str,
    progress: Progress,
    room: Room = HERE,
    keep: Keep = not_kept,
    folder: Path | None = None,
) -> Tensor:
    """The calibration set [samples, sequence_length] int64 of a recipe for the dense model `source`.

    Text of the model's own is sampled in `room`; see `kept_tokens` for `keep`, `sampled_tokens` for `folder`.
    """
    if recipe.source != "self":
        return text_tokens(source.folder, Path(recipe.source), recipe.samples, recipe.sequence_length, seed)
    starts = text_starts(source.folder, recipe.start)
    return sampled_tokens(source, recipe, starts, seed, precision, progress, room, keep, folder)


def tokens_of_run(
    source: Checkpoint,
    record: SourceRecord,
    recipe: Recipe,
    texts: Path | None,
    room: Room,
    progress: Progress,
) -> Tensor:
    """The calibration set; the model's own text from `texts` if a run before left it there."""

    def make(keep: Keep) -> Tensor:
        asked = recipe.calibration
        return calibration_tokens(source, asked, recipe.seed, recipe.precision, progress, room, keep, texts)

    if texts is None or recipe.calibration.source != "self":
        return make(not_kept)
    what = {
        "source": dict(record.files),
        "recipe": recipe.calibration.model_dump(mode="json"),
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    return kept_tokens(texts, what, make, room.team)


def kept_tokens(
    folder: Path, what: Mapping[str, object], make: Callable[[Keep], Tensor], team: Team = ALONE
) -> Tensor:
    """The tokens `make` gives, kept in `folder` for other runs; `what` says all that decides them.

    A file that cannot be read is made again; all processes of a team find the same. A process that works
    alone also keeps the parts that `make` names, until it has the whole: a run that is killed loses one part.
    """
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]
    path = folder / f"text-{name}.safetensors"
    known = _read(path)
    if team.total(torch.tensor(float(known is not None))) == team.count:
        assert known is not None
        return known

    def keep(part: str, make_part: Callable[[], Tensor]) -> Tensor:
        return _kept(path.with_suffix(f".{part}.safetensors"), make_part)

    tokens = make(keep if team.count == 1 else not_kept)
    if team.leads:
        _write(path, tokens)
        for done in folder.glob(f"{path.stem}.*"):
            if done != path:
                done.unlink()
    return tokens


def _kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    known = _read(path)
    if known is None:
        known = make()
        _write(path, known)
    return known


def _read(path: Path) -> Tensor | None:
    """The tokens in a file, if it can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, tokens: Tensor) -> None:
    """In one move."""
    from safetensors.torch import save_file

    partial = path.with_suffix(f".{os.getpid()}")
    save_file({"tokens": tokens}, partial)
    os.replace(partial, path)


def text_starts(folder: Path, kind: str) -> list[list[int]]:
    """How texts of the model in `folder` begin: a plain one, a user's turn; none if nothing is known.

    A user's turn is what the chat template writes before the user's first word: the model goes on with a
    question and then its answer.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if kind == "random" or not any((folder / name).is_file() for name in names):
        return []
    from losa_deploy.text.tokenizer import load_tokenizer

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
