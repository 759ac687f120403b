"""The architectures of llama.cpp that we write: one file each, which registers itself when imported."""

from . import llama, qwen2, qwen3, smollm3
from .base import (
    ARCHITECTURES,
    Architecture,
    Part,
    architecture,
    decoder_parts,
    find_architecture,
    register,
    tensor_names,
    weight_name,
)
from .config import head_dim
from .keys import decoder_keys, write_keys
from .refusals import ONNX_HINT
from .rope import Rope

__all__ = [
    "ARCHITECTURES",
    "ONNX_HINT",
    "Architecture",
    "Part",
    "Rope",
    "architecture",
    "decoder_keys",
    "decoder_parts",
    "find_architecture",
    "head_dim",
    "llama",
    "qwen2",
    "qwen3",
    "register",
    "smollm3",
    "tensor_names",
    "weight_name",
    "write_keys",
]
