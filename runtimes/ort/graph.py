"""What an exported decoder graph takes and returns, read from the session itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from losa_deploy.errors import InputError

from ..facts import ModelFacts
from .cache import CacheSpec

if TYPE_CHECKING:
    import onnxruntime as ort

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
}
PLAIN_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Graph:
    """Names and types of a decoder's inputs and outputs."""

    inputs: frozenset[str]
    id_dtype: np.dtype[np.generic]
    vocab_size: int
    logits_dtype: np.dtype[np.generic]
    cache: CacheSpec


def read_graph(session: ort.InferenceSession, facts: ModelFacts, folder: Path) -> Graph:
    """Check that the session is a decoder with a cache; raises `InputError` naming what is missing."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = {o.name: o for o in session.get_outputs()}
    for name, there in (("input_ids", inputs), ("attention_mask", inputs), ("logits", outputs)):
        if name not in there:
            raise _refuse(folder, f"no {name!r}", sorted(there))
    past = tuple(name for name in inputs if name.startswith("past_key_values."))
    present = tuple(name.replace("past_key_values.", "present.", 1) for name in past)
    if not past or set(present) - set(outputs):
        missing = sorted(set(present) - set(outputs))
        raise _refuse(
            folder, f"no output {missing[0]!r}" if missing else "no key/value cache", sorted(outputs)
        )
    unknown = sorted(set(inputs) - set(past) - set(PLAIN_INPUTS))
    if unknown:
        raise _refuse(folder, f"an input {unknown[0]!r} of unknown meaning", sorted(inputs))
    _, heads, _, head_dim = inputs[past[0]].shape
    spec = CacheSpec(
        past=past,
        present=present,
        kv_heads=heads if isinstance(heads, int) else facts.kv_heads,
        head_dim=head_dim if isinstance(head_dim, int) else facts.head_dim,
        dtype=_dtype(folder, past[0], inputs[past[0]].type),
    )
    if not (spec.kv_heads and spec.head_dim):
        raise InputError(
            f"Neither the graph nor config.json in {folder} tells the size of the key/value cache.",
            hint="Copy the model's config.json beside model.onnx.",
        )
    vocab = outputs["logits"].shape[-1]
    return Graph(
        inputs=frozenset(inputs),
        id_dtype=_dtype(folder, "input_ids", inputs["input_ids"].type),
        vocab_size=vocab if isinstance(vocab, int) else facts.vocab_size,
        logits_dtype=_dtype(folder, "logits", outputs["logits"].type),
        cache=spec,
    )


def _dtype(folder: Path, name: str, kind: str) -> np.dtype[np.generic]:
    if kind not in DTYPES:
        raise _refuse(folder, f"{name!r} is a {kind}", sorted(DTYPES))
    return DTYPES[kind]


def _refuse(folder: Path, problem: str, found: list[str]) -> InputError:
    names = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
    return InputError(
        f"{folder / 'model.onnx'} is not a decoder this runtime knows: {problem} (there are {names}).",
        hint="Export it with `losa-deploy export --format onnx`.",
    )
