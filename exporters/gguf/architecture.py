"""What llama.cpp calls the parts of a Hugging Face decoder, and which decoders it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.attention import attention_windows
from losa_deploy.errors import InputError
from losa_deploy.families import Family
from losa_deploy.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter

ONNX_HINT = "Use --format onnx for this model."


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures, as far as the Llama shape has variants."""

    name: str
    rotated: bool
    """Rows of q and k are stored pairwise interleaved, because its rotary embedding takes neighbours."""
    optional: tuple[str, ...]
    """Tensors beyond weights and two norms that it reads."""


ALL_BIASES = (
    *(f"self_attn.{p}_proj.bias" for p in "qkvo"),
    *(f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", rotated=True, optional=ALL_BIASES),
    "mistral": Architecture("llama", rotated=True, optional=ALL_BIASES),
    "qwen2": Architecture("qwen2", rotated=False, optional=tuple(f"self_attn.{p}_proj.bias" for p in "qkv")),
    "smollm3": Architecture("smollm3", rotated=True, optional=()),
    "qwen3": Architecture(
        "qwen3", rotated=False, optional=("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    ),
}
"""`model_type` → architecture."""
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a block → its name in a GGUF."""
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
"""What llama.cpp computes YaRN with, whatever the file says."""
BUFFERS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of tensors that old checkpoints carry and nobody reads."""


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a model; `InputError` naming what llama.cpp does not know about it."""
    model_type = str(checkpoint.config.get("model_type", ""))
    found = ARCHITECTURES.get(model_type)
    if found is None:
        raise InputError(
            f"llama.cpp has no graph for {model_type} as this exporter writes it; it can export "
            f"{', '.join(ARCHITECTURES)}.",
            hint=ONNX_HINT,
        )
    config = checkpoint.config
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(
            f"config.json says hidden_act {activation!r}; llama.cpp computes {found.name} with silu.",
            hint=ONNX_HINT,
        )
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            "config.json has a partial_rotary_factor, which this exporter does not write.", hint=ONNX_HINT
        )
    _check_unrotated(config)
    Rope.of(config)
    _refuse_windows(config)
    tensor_names(checkpoint, found)
    return found


def _check_unrotated(config: Mapping[str, object]) -> None:
    """Blocks without rotary embedding: as a list, or every n-th where there is none."""
    key, interval = "no_rope_layers", config.get("no_rope_layer_interval")
    rotated = config.get(key)
    if not rotated and interval and config.get("model_type") == "smollm3":
        key, every = "no_rope_layer_interval", _whole(config, "no_rope_layer_interval")
        rotated = [int((i + 1) % every != 0) for i in range(_whole(config, "num_hidden_layers"))]
    if isinstance(rotated, list) and rotated != [int(i % 4 != 3) for i in range(len(rotated))]:
        raise InputError(
            f"config.json has {key} {config[key]}; llama.cpp leaves out every fourth.", hint=ONNX_HINT
        )


def tensor_names(checkpoint: Checkpoint, kind: Architecture) -> dict[str, str]:
    """Tensor of the checkpoint → its name in the GGUF, in the order of the file.

    Raises `InputError` for a tensor that llama.cpp would not read, which would change what is computed.
    """
    family = checkpoint.family
    names = {f"{family.embedding}.weight": "token_embd.weight"}
    for block in range(checkpoint.block_count):
        for module, part in PARTS.items():
            for end in ("weight", "bias"):
                inner = f"{module}.{end}"
                name = f"{family.blocks}.{block}.{inner}"
                linear = module.endswith("_proj") and end == "weight"
                if linear or inner in NORMS or (inner in kind.optional and name in checkpoint):
                    names[name] = f"blk.{block}.{part}.{end}"
    names[f"{family.final_norm}.weight"] = "output_norm.weight"
    if not checkpoint.tied:
        names[f"{family.head}.weight"] = "output.weight"
    for name in checkpoint.files:
        if name not in names and name != f"{family.head}.weight" and not name.endswith(BUFFERS):
            raise InputError(
                f"{checkpoint.folder} has the tensor {name}, which llama.cpp's {kind.name} does not read.",
                hint=ONNX_HINT,
            )
    return names


def interleaved(rows: int, heads: int) -> NDArray[np.intp]:
    """Order [rows] in which llama.cpp stores the rows of q or k: of each head the first row of the first
    half, the first of the second, and so on."""
    order: NDArray[np.intp] = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
    return order


def row_order(
    config: Mapping[str, object], kind: Architecture, module: str, rows: int
) -> NDArray[np.intp] | None:
    """How the rows of a module's weight and bias are reordered, None if they stay."""
    heads = {"q_proj": head_count, "k_proj": kv_head_count}
    count = heads.get(module.rpartition(".")[2])
    return interleaved(rows, count(config)) if count is not None and kind.rotated else None


def weight_name(family: Family, module: str) -> str:
    """What a linear, the embedding or the head is called in a GGUF."""
    if module == family.embedding:
        return "token_embd.weight"
    if module == family.head:
        return "output.weight"
    block, _, inner = module.removeprefix(family.blocks + ".").partition(".")
    return f"blk.{block}.{PARTS[inner]}.weight"


def head_count(config: Mapping[str, object]) -> int:
    return _whole(config, "num_attention_heads")


def kv_head_count(config: Mapping[str, object]) -> int:
    return _whole(config, "num_key_value_heads") if config.get("num_key_value_heads") else head_count(config)


def head_dim(config: Mapping[str, object]) -> int:
    if config.get("head_dim"):
        return _whole(config, "head_dim")
    return _whole(config, "hidden_size") // head_count(config)


def write_shape(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """The keys from which llama.cpp builds the graph."""
    config = checkpoint.config
    writer.add_block_count(checkpoint.block_count)
    writer.add_context_length(_whole(config, "max_position_embeddings"))
    writer.add_embedding_length(_whole(config, "hidden_size"))
    writer.add_feed_forward_length(_whole(config, "intermediate_size"))
    writer.add_head_count(head_count(config))
    writer.add_head_count_kv(kv_head_count(config))
    writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(Rope.of(config).base)
    writer.add_rope_dimension_count(head_dim(config))
    if head_dim(config) * head_count(config) != _whole(config, "hidden_size"):
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    writer.add_vocab_size(checkpoint.shape(f"{checkpoint.family.embedding}.weight")[0])
    Rope.of(config).write(writer)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and scaling."""

    base: float
    kind: str
    """default, linear, yarn or llama3."""
    values: Mapping[str, object]

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Rope:
        """From a `config.json` of transformers 4 or 5; `InputError` for scaling that llama.cpp lacks."""
        values: dict[str, object] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = config.get(key)
            values |= found if isinstance(found, Mapping) else {}
        kind = str(values.get("rope_type") or values.get("type") or "default")
        if kind not in ("default", "linear", "yarn", "llama3"):
            raise InputError(
                f"config.json scales the rotary embedding by {kind!r}; this exporter writes linear, yarn and "
                "llama3.",
                hint=ONNX_HINT,
            )
        own = [key for key, usual in YARN.items() if values.get(key) not in (None, usual)]
        if kind == "yarn" and own:
            raise InputError(
                f"config.json sets {own[0]} of YaRN to {values[own[0]]}; llama.cpp takes no value from the "
                "file.",
                hint=ONNX_HINT,
            )
        base = values.get("rope_theta") or config.get("rope_theta") or 10000.0
        return cls(float(str(base)), kind, values)

    def write(self, writer: GGUFWriter) -> None:
        """Scaling keys; llama3 has none, its factors are the tensor `rope_freqs.weight`."""
        from gguf import RopeScalingType

        if self.kind not in ("linear", "yarn"):
            return
        writer.add_rope_scaling_type(RopeScalingType(self.kind))
        writer.add_rope_scaling_factor(_number(self.values, "factor", 1.0))
        if self.kind == "yarn" and self.values.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(_whole(self.values, "original_max_position_embeddings"))

    def factors(self, width: int) -> NDArray[np.float32] | None:
        """llama3: by what each of the `width` / 2 frequencies is divided; None for other kinds.

        Frequencies whose wavelength is short against the original context stay, long ones are divided
        by `factor`, and those between change gradually.
        """
        if self.kind != "llama3":
            return None
        factor = _number(self.values, "factor", 8.0)
        low, high = (
            _number(self.values, "low_freq_factor", 1.0),
            _number(self.values, "high_freq_factor", 4.0),
        )
        context = _number(self.values, "original_max_position_embeddings", 8192)
        frequency = self.base ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        turns = context * frequency / (2 * pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        divisors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
        return divisors


def _refuse_windows(config: Mapping[str, object]) -> None:
    """Raise `InputError` if a block attends to a window; llama.cpp's graphs of these models do not."""
    windows = [window for window in attention_windows(config) if window is not None]
    if not windows:
        return
    window, context = windows[0], _whole(config, "max_position_embeddings")
    raise InputError(
        f"config.json limits attention to a sliding_window of {window} tokens in {len(windows)} blocks, and "
        f"the context is {context} tokens; llama.cpp attends to all of them.",
        hint=f"Use --format onnx for this model; or, if no text will be longer than {window} tokens, set "
        f"max_position_embeddings to {window} in config.json.",
    )


def _whole(config: Mapping[str, object], key: str) -> int:
    try:
        return int(str(config[key]))
    except (KeyError, ValueError):
        raise InputError(
            f"config.json has {key} {config.get(key)!r}, expected a whole number.",
            hint="Copy the model's config.json again.",
        ) from None


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    try:
        return default if value is None else float(str(value))
    except ValueError:
        raise InputError(
            f"config.json has {key} {value!r}, expected a number.", hint="Copy the model's config.json again."
        ) from None
