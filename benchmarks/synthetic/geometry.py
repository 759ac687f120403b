"""Synthetic models of the Llama shape: random weights, with the sizes and the memory traffic of real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.layouts.base import FORMAT_VERSION
from losa_deploy.output import require_disk
from losa_deploy.progress import Progress, no_progress

from .decoder import CONTEXT, EPSILON, THETA, Geometry, write_decoder
from .graphs import DATA_FILE, MODEL_FILE, GraphWriter
from .linears import Linear
from .tensors import Pruning

SPEC_FILE = "bench.json"
"""What a folder holds; written last, so that a folder without it is not reused."""
BUILDER = 4
"""Raise when the graph changes, so that kept models are written anew."""


GEOMETRIES: Mapping[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry("llama-1b", 2048, 5632, 22, 32, 4, 32_000),
        Geometry("llama-3b", 3072, 8192, 28, 24, 8, 128_256, tied=True),
        Geometry("llama-7b", 4096, 11_008, 32, 32, 32, 32_000),
        Geometry("llama-7b-4blocks", 4096, 11_008, 4, 32, 32, 32_000),
        Geometry("tiny", 128, 256, 2, 4, 2, 512),
    )
}
"""TinyLlama 1.1B, Llama 3.2 3B, Llama 2 7B, its first blocks, and one for tests."""


def build(
    geometry: Geometry,
    kind: Linear,
    folder: Path,
    pruning: Pruning,
    *,
    progress: Progress = no_progress,
) -> int:
    """Write the model into `folder`, or reuse what is there; returns the bytes of the model files.

    All contenders get the same pruned weights: to a dense one zeros are numbers like others.
    Raises `ResourceError` if the disk is too small, `InputError` if the folder is something else.
    """
    spec = _spec(geometry, kind, pruning)
    if folder.exists():
        if not (folder / SPEC_FILE).is_file():
            raise InputError(f"{folder} is no model of a benchmark.", hint="Give another folder to --keep.")
        if json.loads((folder / SPEC_FILE).read_text("utf-8")) == spec:
            return model_bytes(folder)
        shutil.rmtree(folder)
    require_disk(folder.parent, geometry.estimate(kind), f"The model {kind.name}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with GraphWriter(partial) as graph:
            write_decoder(geometry, kind, graph, pruning, progress)
        _write_configs(geometry, partial)
        (partial / SPEC_FILE).write_text(json.dumps(spec, indent=1), "utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return model_bytes(folder)


def model_bytes(folder: Path) -> int:
    """Bytes of the graph and its data."""
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE))


def _spec(geometry: Geometry, kind: Linear, pruning: Pruning) -> dict[str, object]:
    return {
        "geometry": asdict(geometry),
        "contender": kind.name,
        "storage": kind.describe(),
        "sparsity": pruning.sparsity,
        "pattern": list(pruning.pattern) if pruning.pattern else None,
        "stride": pruning.stride,
        "paired": pruning.paired,
        "seed": pruning.seed,
        "format": FORMAT_VERSION,
        "builder": BUILDER,
    }


def _write_configs(geometry: Geometry, folder: Path) -> None:
    """`config.json` and `genai_config.json`, as far as runtimes read them."""
    sizes = {"hidden_size": geometry.hidden, "num_attention_heads": geometry.heads}
    sizes |= {"num_hidden_layers": geometry.blocks, "num_key_value_heads": geometry.kv_heads}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "head_dim": geometry.head_dim,
        "intermediate_size": geometry.intermediate,
        "vocab_size": geometry.vocab,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": geometry.tied,
        "rope_theta": THETA,
        "rms_norm_eps": EPSILON,
    }
    cache = {f"{time}_{part}_names": f"{name}.%d.{part}" for time, name in _CACHES for part in _PARTS}
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": MODEL_FILE,
        "head_size": geometry.head_dim,
        **sizes,
        "inputs": names | {key: value for key, value in cache.items() if key.startswith("past")},
        "outputs": {"logits": "logits"}
        | {key: value for key, value in cache.items() if key.startswith("present")},
    }
    model = {"type": "llama", "context_length": CONTEXT, "vocab_size": geometry.vocab, "decoder": decoder}
    model |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    genai = {"model": model, "search": {"max_length": CONTEXT, "past_present_share_buffer": True}}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=4), "utf-8")


_CACHES = (("past", "past_key_values"), ("present", "present"))
_PARTS = ("key", "value")
