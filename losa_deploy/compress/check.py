"""Whether the model that compression reads tensor by tensor is the one that transformers loads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.memory import LIBRARY_BYTES, all_parameters
from losa_deploy.errors import InputError
from losa_deploy.pretrained import load_model
from losa_deploy.sources.checkpoint import Checkpoint, write_weights
from losa_deploy.verify.distance import logit_tolerance

PROBE_TOKENS, PROBE_STRIDE = 32, 7919
"""Length of the sequence that compares two models, and how far apart its token ids are."""
FIRST_BLOCKS = 2
"""Blocks that are compared of a model that is not compared as a whole."""
WHOLE_BYTES = 2_000_000_000
"""Memory that comparing a model as a whole may take: it is not to be what needs most in a compression."""
PER_BLOCK = ("layer_types", "no_rope_layers")
"""Keys of a configuration with an entry for each block."""


def is_whole(parameters: int, memory: int) -> bool:
    """Whether a model of so many parameters, which transformers loads in f32, is compared as a whole."""
    return 4 * parameters + LIBRARY_BYTES <= min(memory, WHOLE_BYTES)


@torch.no_grad()
def check_unpruned(source: Checkpoint, place: Path, memory: int) -> None:
    """Compare the model put together from the source's tensors with the one transformers loads, on logits.

    If the two differ, what is compressed is not the user's model. Of a model whose comparison takes more than
    `memory` bytes, or `WHOLE_BYTES`, only the first blocks are compared, from a copy in a new folder inside
    of `place` that is deleted again. Raises `InputError`.
    """
    if is_whole(all_parameters(source), memory):
        _compare(source, source)
        return
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".losa-check-", dir=place) as folder:
        _compare(first_blocks(source, Path(folder), FIRST_BLOCKS), source)


def first_blocks(source: Checkpoint, folder: Path, count: int) -> Checkpoint:
    """A copy of a model with its first blocks only, in an empty folder."""
    config = dict(source.config)
    config["num_hidden_layers"] = count
    for key in PER_BLOCK:
        found = config.get(key)
        if isinstance(found, list):
            config[key] = found[:count]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    inside = f"{source.family.blocks}."

    def kept(name: str) -> bool:
        return not name.startswith(inside) or int(name[len(inside) :].split(".")[0]) < count

    write_weights(folder, ((name, source.tensor(name)) for name in source.files if kept(name)))
    return Checkpoint.open(folder)


def _compare(model: Checkpoint, source: Checkpoint) -> None:
    vocabulary = model.shape(f"{model.family.embedding}.weight")[0]
    tokens = (torch.arange(1, PROBE_TOKENS + 1) * PROBE_STRIDE % vocabulary)[None]
    found = Decoder(model).logits(tokens)
    expected: Tensor = load_model(model.folder)(input_ids=tokens, use_cache=False).logits
    difference = float((found - expected).abs().max())
    inner = max(columns for _, columns in model.linears.values())
    tolerance = logit_tolerance(float(expected.abs().max()), model.block_count, inner)
    if not difference <= tolerance:
        raise InputError(
            f"The tensors of {source.folder} are not the model that transformers loads from it: logits "
            f"differ by {difference:.3g}, expected at most {tolerance:.3g}.",
            hint="Load the model with transformers and save it to a new folder with save_pretrained.",
        )
