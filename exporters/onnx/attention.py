"""What a block's attention depends on, put right in the builder's graph.

onnxruntime-genai's builder drops the window of models whose configuration has no `layer_types`, fails
on blocks without rotary positions, and computes scaled rotary positions differently from transformers,
class by class. So it is given the model as if every block attended to everything with plain rotary
positions, which it does right for all families; the attention nodes of its graph say the rest.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from losa_deploy.attention import attention_windows, model_config
from losa_deploy.errors import InputError
from losa_deploy.sources.checkpoint import Checkpoint

PAST_KEY = re.compile(r"past_key_values\.(\d+)\.key")
PAST_INPUT, COS_INPUT, SIN_INPUT = 3, 7, 8
"""Where a GroupQueryAttention node takes its past keys and the two rotary tables."""
WHOLE = -1
"""The operator's window of a node that attends to everything."""
TABLED = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rotary scalings whose angles depend on the position alone, so that they fit into tables.

`dynamic` is one of them because its frequencies change beyond `max_position_embeddings` only.
"""
TRACED = ("longrope",)
"""Rotary scalings whose angles depend on the length of the sequence too."""


def rope_kind(checkpoint: Checkpoint) -> str:
    """How the rotary embedding is scaled; `default` if it is not, or if there is none.

    Raises `InputError` for a kind that no graph source computes.
    """
    rope = getattr(model_config(checkpoint.config), "rope_parameters", None) or {}
    kind = str(rope.get("rope_type") or "default")
    if kind not in TABLED + TRACED:
        raise InputError(
            f"config.json scales the rotary embedding by {kind!r}; the ONNX export knows "
            f"{', '.join((*TABLED, *TRACED))}.",
            hint="Check rope_type in config.json.",
        )
    return kind


def write_plain_model(checkpoint: Checkpoint, folder: Path) -> None:
    """The model for the builder: its files, and a `config.json` that says nothing of attention.

    It does say whether the head is the embedding, which the builder does not find out.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = model_config(checkpoint.config)
    kind, blocks = type(config), config.num_hidden_layers
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.tie_word_embeddings = checkpoint.tied
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    if hasattr(kind, "sliding_window"):
        config.sliding_window = None
    if hasattr(kind, "layer_types"):
        config.layer_types = ["full_attention"] * blocks
    if hasattr(kind, "no_rope_layers"):
        config.no_rope_layers = [1] * blocks
    folder.mkdir()
    config.save_pretrained(folder)
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())


def set_attention(graph: onnx.GraphProto, checkpoint: Checkpoint) -> None:
    """Give every attention node of a plain model's graph the window and positions of its block.

    Raises `InputError` if the graph has no node for a block.
    """
    windows, rotated = attention_windows(checkpoint.config), _rotated(checkpoint)
    nodes = {}
    for node in graph.node:
        match = PAST_KEY.fullmatch(node.input[PAST_INPUT]) if node.op_type == "GroupQueryAttention" else None
        if match:
            nodes[int(match[1])] = node
    if sorted(nodes) != list(range(len(windows))):
        raise InputError(
            f"The ONNX graph has fused attention in blocks {sorted(nodes)}, expected in all "
            f"{len(windows)} of them.",
            hint="Install the version of onnxruntime-genai that losa-deploy was tested with, 0.18.",
        )
    tables = _tables(checkpoint)
    for name, table in zip((nodes[0].input[COS_INPUT], nodes[0].input[SIN_INPUT]), tables, strict=False):
        _set_initializer(graph, name, table)
    for block, node in nodes.items():
        _set(node, "local_window_size", windows[block] or WHOLE)
        if not rotated[block]:
            _set(node, "do_rotary", 0)
            node.input[COS_INPUT] = node.input[SIN_INPUT] = ""


def _rotated(checkpoint: Checkpoint) -> list[bool]:
    """Of each block, whether its attention has rotary positions."""
    config = model_config(checkpoint.config)
    if not hasattr(type(config), "no_rope_layers"):
        return [True] * config.num_hidden_layers
    return [bool(flag) for flag in config.no_rope_layers]


def _tables(checkpoint: Checkpoint) -> tuple[NDArray[np.float32], ...]:
    """Cosines and sines [context, head size / 2] of scaled positions; nothing if they are not scaled."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope_kind(checkpoint)
    if kind == "default":
        return ()
    config = model_config(checkpoint.config)
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()


def _set(node: onnx.NodeProto, name: str, value: int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _set_initializer(graph: onnx.GraphProto, name: str, array: NDArray[np.float32]) -> None:
    for tensor in graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
