"""Small Llama models for llama.cpp, written with the values that each type of ggml stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

HIDDEN, INTERMEDIATE, BLOCKS, HEADS, KV_HEADS, VOCAB = 128, 224, 2, 4, 2, 320
LINEARS = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
    "attn_v": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
Floats = NDArray[np.float32]
Write = Callable[..., Path]


def sparse(rng: np.random.Generator, shape: tuple[int, int], kept: float) -> Floats:
    weight = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
    return np.where(rng.random(shape) < kept, weight, np.float32(0)).astype(np.float32)


def to_stock(weight: Floats, kind: str) -> NDArray[np.generic]:
    """Rows of bytes (Q8_0 with one scale per row, Q4_0) or of floats."""
    if kind in ("F32", "F16"):
        return weight.astype(np.float32 if kind == "F32" else np.float16)
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // 32, 32)
    if kind == "Q8_0":
        scale = (np.abs(weight).max(axis=1) / 127).astype(np.float16).reshape(rows, 1, 1)
        scale = np.broadcast_to(np.where(scale == 0, np.float16(1), scale), (rows, columns // 32, 1))
        levels = np.clip(np.rint(blocks / scale.astype(np.float32)), -127, 127).astype(np.int8)
        body = levels.view(np.uint8)
    else:
        scale = (np.abs(blocks).max(axis=2, keepdims=True) / 7).astype(np.float16)
        step = np.where(scale == 0, np.float16(1), scale).astype(np.float32)
        codes = (np.clip(np.rint(blocks / step), -8, 7) + 8).astype(np.uint8)
        body = codes[:, :, :16] | codes[:, :, 16:] << 4
    scales = np.ascontiguousarray(scale).view(np.uint8).reshape(rows, columns // 32, 2)
    return np.concatenate([scales, body], axis=2).reshape(rows, -1)


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function: type of the block linears (and share kept) → GGUF file of a seeded random model."""
    import gguf

    def write(kind: str, kept: float = 0.4) -> Path:
        path = tmp_path_factory.mktemp("model") / f"{kind}.gguf"
        rng = np.random.default_rng(7)
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(1024)
        writer.add_embedding_length(HIDDEN)
        writer.add_block_count(BLOCKS)
        writer.add_feed_forward_length(INTERMEDIATE)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_vocab_size(VOCAB)
        writer.add_tokenizer_model("no_vocab")
        for name in ("token_embd.weight", "output.weight"):
            writer.add_tensor(name, sparse(rng, (VOCAB, HIDDEN), 1.0) * np.float32(8))
        for block in range(BLOCKS):
            for norm in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.{block}.{norm}.weight", np.ones(HIDDEN, np.float32))
            for name, shape in LINEARS.items():
                dtype = gguf.GGMLQuantizationType[kind]
                stock = to_stock(sparse(rng, shape, kept), kind)
                writer.add_tensor(f"blk.{block}.{name}.weight", stock, raw_dtype=dtype)
        writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
