"""Llama, and Mistral where its window is not shorter than the context; biases where a checkpoint has them."""

from losa_deploy.gguf.names import LINEARS

from .base import Architecture, decoder_parts, register
from .rows import interleaved_heads

LLAMA = register(
    Architecture("llama", ("llama", "mistral"), decoder_parts(biases=LINEARS), row_order=interleaved_heads)
)
