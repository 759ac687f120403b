"""Numbers of a parsed `config.json`; `InputError` naming the key where one is missing or no number."""

from __future__ import annotations

from collections.abc import Mapping

from losa_deploy.errors import InputError

COPY_HINT = "Copy the model's config.json again."


def whole(config: Mapping[str, object], key: str) -> int:
    """A whole number that has to be there."""
    try:
        return int(str(config[key]))
    except (KeyError, ValueError):
        raise InputError(
            f"config.json has {key} {config.get(key)!r}, expected a whole number.", hint=COPY_HINT
        ) from None


def number(config: Mapping[str, object], key: str, default: float) -> float:
    """A number, `default` if there is none."""
    value = config.get(key)
    try:
        return default if value is None else float(str(value))
    except ValueError:
        raise InputError(f"config.json has {key} {value!r}, expected a number.", hint=COPY_HINT) from None


def head_count(config: Mapping[str, object]) -> int:
    return whole(config, "num_attention_heads")


def kv_head_count(config: Mapping[str, object]) -> int:
    return whole(config, "num_key_value_heads") if config.get("num_key_value_heads") else head_count(config)


def head_dim(config: Mapping[str, object]) -> int:
    if config.get("head_dim"):
        return whole(config, "head_dim")
    return whole(config, "hidden_size") // head_count(config)
