"""What a model folder's configuration files say about the sequences its sessions take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.errors import InputError

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes a runtime needs beyond the graph; 0 means that the folder does not say."""

    context_length: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    shared_cache: bool
    """The graph may write the new keys and values into the buffers it read the old ones from."""

    @classmethod
    def read(cls, folder: Path) -> ModelFacts:
        """From `config.json`, and `genai_config.json` where there is one."""
        config = read_object(folder / "config.json")
        genai = read_object(folder / "genai_config.json")
        model = _section(genai, "model")
        decoder = _section(model, "decoder")
        heads = _int(config, "num_attention_heads") or _int(decoder, "num_attention_heads")
        hidden = _int(config, "hidden_size") or _int(decoder, "hidden_size")
        return cls(
            context_length=_first(config, CONTEXT_KEYS) or _int(model, "context_length"),
            kv_heads=_int(config, "num_key_value_heads") or _int(decoder, "num_key_value_heads") or heads,
            head_dim=_int(config, "head_dim")
            or _int(decoder, "head_size")
            or (hidden // heads if heads else 0),
            vocab_size=_int(config, "vocab_size") or _int(model, "vocab_size"),
            shared_cache=_section(genai, "search").get("past_present_share_buffer") is True,
        )


def check_tokens(tokens: Sequence[int], vocab_size: int, context_length: int) -> None:
    """Raise `InputError` for an empty sequence, one longer than the context, or an unknown id."""
    if not tokens:
        raise InputError("The prompt has no tokens, expected at least one.", hint="Give a longer prompt.")
    if context_length and len(tokens) > context_length:
        raise InputError(
            f"The prompt has {len(tokens)} tokens, the model's context holds {context_length}.",
            hint="Shorten the prompt.",
            details={"tokens": len(tokens), "context_length": context_length},
        )
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"Token {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}.",
            hint="Check that the tokenizer files belong to this model.",
        )


def check_step(token: int, position: int, vocab_size: int, context_length: int) -> None:
    """Checks of one more token at `position` (0 = first); `position` 0 means that no prefill was done."""
    check_steps((token,), position, vocab_size, context_length)


def check_steps(tokens: Sequence[int], position: int, vocab_size: int, context_length: int) -> None:
    """The same of several tokens, the first of them at `position`."""
    if position == 0:
        raise RuntimeError("step() needs a prefill() before it")
    check_tokens(tokens, vocab_size, 0)
    if context_length and position + len(tokens) > context_length:
        raise InputError(
            f"The sequence has {position} tokens, the model's context holds {context_length}.",
            hint="Start a new sequence.",
        )


def thread_count(threads: int) -> int:
    """`threads`, or for 0 the physical cores this process may use."""
    if threads > 0:
        return threads
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def read_object(path: Path) -> Mapping[str, object]:
    """A JSON object, or an empty one if there is no such file; damaged files are an `InputError`."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.", hint="Export the model again.") from None
    return data if isinstance(data, dict) else {}


def _section(data: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _int(data: Mapping[str, object], key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) else 0


def _first(data: Mapping[str, object], keys: Sequence[str]) -> int:
    return next((v for v in (_int(data, k) for k in keys) if v), 0)
