"""The stream through the blocks in batches, the last of them short, against the model at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.compress.decoder import Decoder

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
GATED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MODELS = {
    "llama": ("LlamaConfig", GATED),
    "mistral": ("MistralConfig", {**GATED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", {**GATED, **SLIDING}),
    "opt": ("OPTConfig", {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 1}),
    "opt-post-norm": (
        "OPTConfig",
        {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False, "pad_token_id": 1},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [3, 9])
def test_a_short_last_batch_gives_what_the_model_gives(kind: str, length: int, tmp_path: Path) -> None:
    """As many tokens as samples per batch, or more: nothing may take one dimension for the other."""
    import transformers

    name, values = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    decoder = Decoder(Checkpoint.open(tmp_path))
    tokens = torch.randint(2, 100, (5, length))
    stream = decoder.stream(tokens, 3)
    assert [part.stop - part.start for part in stream.batches()] == [3, 2]
    states = decoder.model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(stream.hidden, states[0], atol=1e-6)
    stream = decoder.advance(0, stream)
    assert torch.allclose(stream.hidden, states[1], atol=1e-5)
    last = decoder.advance(1, stream)
    assert torch.allclose(last.hidden, _last(decoder, tokens), atol=1e-5)
    assert torch.allclose(decoder.finish(last), decoder.features(tokens), atol=1e-5)
    assert torch.allclose(decoder.head(decoder.finish(last)), decoder.logits(tokens), atol=1e-5)


def _last(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Output of the last block, before the final norm."""
    seen: list[torch.Tensor] = []
    block = decoder.blocks[-1]
    handle = block.register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    decoder.logits(tokens)
    handle.remove()
    return seen[0]
