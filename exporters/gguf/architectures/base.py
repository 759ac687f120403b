"""What an architecture of llama.cpp is to the exporter: a description, from which files are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.families import Family
from losa_deploy.gguf.names import EMBEDDING, FINAL_NORM, HEAD, HEAD_NORMS, PARTS, block_tensor
from losa_deploy.sources.checkpoint import Checkpoint

from .keys import Keys, decoder_keys
from .refusals import ONNX_HINT, Refusal, refuse_partial_rotation, refuse_unrotated_blocks, refuse_windows
from .rope import Rope
from .rows import RowOrder, as_they_are

BUFFERS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of tensors that old checkpoints carry and nobody reads."""
REFUSALS: tuple[Refusal, ...] = (refuse_partial_rotation, refuse_unrotated_blocks, refuse_windows)


@dataclass(frozen=True)
class Part:
    """One module of a block: its name in a GGUF, and which of its tensors llama.cpp reads."""

    module: str
    """Within the block, e.g. `self_attn.q_proj`."""
    name: str
    """E.g. `attn_q`."""
    required: tuple[str, ...] = ("weight",)
    optional: tuple[str, ...] = ()
    """Read where the checkpoint has them."""


def decoder_parts(biases: Iterable[str] = (), *, head_norms: bool = False) -> tuple[Part, ...]:
    """Of a block in the shape of Llama: the linears `biases` may have one, and heads norms of their own."""
    with_bias = frozenset(biases)
    return tuple(
        Part(module, name, (), ("weight",))
        if module in HEAD_NORMS
        else Part(module, name, optional=("bias",) if module in with_bias else ())
        for module, name in PARTS.items()
        if head_norms or module not in HEAD_NORMS
    )


def unchanged(name: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs: what it reads from a file, and what it cannot compute."""

    name: str
    """`general.architecture`."""
    model_types: tuple[str, ...]
    """Of config.json, that are written as this architecture."""
    parts: tuple[Part, ...]
    """Of a block, in the order of the file."""
    keys: Callable[[Checkpoint], Keys] = decoder_keys
    activation: str = "silu"
    """The only one of the MLP that its graph computes."""
    activation_key: str = "hidden_act"
    """What config.json calls the activation."""
    ropes: tuple[str, ...] = ("linear", "yarn", "llama3")
    """Kinds of scaled rotary embeddings beside the plain one."""
    row_order: RowOrder = as_they_are
    """How the rows of a linear's weight and bias are stored."""
    vector: Callable[[str, NDArray[np.float32]], NDArray[np.float32]] = unchanged
    """Name in the file and vector of the checkpoint (a norm or a bias) → what is stored.

    Gemma, for one, multiplies by 1 + weight where llama.cpp multiplies by the weight."""
    refusals: tuple[Refusal, ...] = REFUSALS
    """What else config.json may not ask for."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `InputError` naming what llama.cpp would compute otherwise."""
        config = checkpoint.config
        activation = config.get(self.activation_key, self.activation)
        if activation != self.activation:
            raise InputError(
                f"config.json says {self.activation_key} {activation!r}; llama.cpp computes {self.name} with "
                f"{self.activation}.",
                hint=ONNX_HINT,
            )
        Rope.of(config).check(self.ropes)
        for refuse in self.refusals:
            refuse(config)
        tensor_names(checkpoint, self)


ARCHITECTURES: dict[str, Architecture] = {}
"""`model_type` → architecture; filled where each is defined."""


def register(architecture: Architecture) -> Architecture:
    """Add an architecture to `ARCHITECTURES`; called once at the end of the file that defines it."""
    ARCHITECTURES.update(dict.fromkeys(architecture.model_types, architecture))
    return architecture


def find_architecture(config: Mapping[str, object]) -> Architecture:
    """The architecture that a model is written as; `InputError` naming those that can be."""
    model_type = str(config.get("model_type", ""))
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"llama.cpp has no graph for {model_type} as this exporter writes it; it can export "
            f"{', '.join(ARCHITECTURES)}.",
            hint=ONNX_HINT,
        )
    return ARCHITECTURES[model_type]


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a model; `InputError` naming what llama.cpp does not know about it."""
    found = find_architecture(checkpoint.config)
    found.check(checkpoint)
    return found


def tensor_names(checkpoint: Checkpoint, kind: Architecture) -> dict[str, str]:
    """Tensor of the checkpoint → its name in the GGUF, in the order of the file.

    Raises `InputError` for a tensor that llama.cpp would not read, which would change what is computed.
    """
    family = checkpoint.family
    names = {f"{family.embedding}.weight": EMBEDDING}
    for block in range(checkpoint.block_count):
        for part in kind.parts:
            for end in ("weight", "bias"):
                name = f"{family.blocks}.{block}.{part.module}.{end}"
                if end in part.required or (end in part.optional and name in checkpoint):
                    names[name] = block_tensor(block, part.name, end)
    names[f"{family.final_norm}.weight"] = FINAL_NORM
    if not checkpoint.tied:
        names[f"{family.head}.weight"] = HEAD
    for name in checkpoint.files:
        if name not in names and name != f"{family.head}.weight" and not name.endswith(BUFFERS):
            raise InputError(
                f"{checkpoint.folder} has the tensor {name}, which llama.cpp's {kind.name} does not read.",
                hint=ONNX_HINT,
            )
    return names


def weight_name(kind: Architecture, family: Family, module: str) -> str:
    """What a linear, the embedding or the head is called in a GGUF."""
    if module == family.embedding:
        return EMBEDDING
    if module == family.head:
        return HEAD
    block, _, inner = module.removeprefix(family.blocks + ".").partition(".")
    return block_tensor(int(block), next(part.name for part in kind.parts if part.module == inner))
