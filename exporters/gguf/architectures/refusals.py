"""What config.json can ask for that llama.cpp's graphs do not compute: each raises `InputError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from losa_deploy.attention import attention_windows
from losa_deploy.errors import InputError

from .config import whole

ONNX_HINT = "Use --format onnx for this model."
Refusal = Callable[[Mapping[str, object]], None]


def refuse_partial_rotation(config: Mapping[str, object]) -> None:
    """Heads of which only a part is rotated."""
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            "config.json has a partial_rotary_factor, which this exporter does not write.", hint=ONNX_HINT
        )


def refuse_unrotated_blocks(config: Mapping[str, object]) -> None:
    """Blocks without rotary embedding, other than every fourth."""
    rotated = config.get("no_rope_layers")
    if isinstance(rotated, list):
        only_every_fourth(config, "no_rope_layers", rotated)


def only_every_fourth(config: Mapping[str, object], key: str, rotated: Sequence[object]) -> None:
    """Raise unless `rotated`, which says of each block whether it is, is 0 for every fourth only."""
    if list(rotated) != [int(block % 4 != 3) for block in range(len(rotated))]:
        raise InputError(
            f"config.json has {key} {config[key]}; llama.cpp leaves out every fourth.", hint=ONNX_HINT
        )


def refuse_windows(config: Mapping[str, object]) -> None:
    """Blocks that attend to a window only."""
    windows = [window for window in attention_windows(config) if window is not None]
    if not windows:
        return
    window, context = windows[0], whole(config, "max_position_embeddings")
    raise InputError(
        f"config.json limits attention to a sliding_window of {window} tokens in {len(windows)} blocks, and "
        f"the context is {context} tokens; llama.cpp attends to all of them.",
        hint=f"Use --format onnx for this model; or, if no text will be longer than {window} tokens, set "
        f"max_position_embeddings to {window} in config.json.",
    )
