"""The stream through the blocks in batches, the last of them short, against the model at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losa_deploy.compress.decoder import Decoder
from losa_deploy.sources.checkpoint import Checkpoint

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
    decoder = Decoder(Checkpoint.open(tmp_path)).keep()
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


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_has_memory_only_while_it_is_open(kind: str, tmp_path: Path) -> None:
    import transformers

    name, values = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(tmp_path))
    source = Checkpoint.open(tmp_path)
    kept, decoder = Decoder(source).keep(), Decoder(source)
    tokens = torch.randint(2, 100, (3, 9))

    seen: list[tuple[bool, bool]] = []

    def empty(block: int) -> bool:
        return all(value.is_meta for value in decoder.blocks[block].parameters())

    assert torch.equal(decoder.logits(tokens), kept.logits(tokens))
    changed = decoder.logits_by_block(tokens, lambda block: seen.append((empty(block), empty(1 - block))))
    assert torch.allclose(changed, kept.logits(tokens), atol=1e-5)
    assert seen == [(False, True)] * 2 and empty(0) and empty(1)
    with decoder.open(0):
        first = decoder.block_parameters(0)[0]
        decoder.model.get_parameter(first).data.zero_()
        with decoder.open(1, 0):
            assert not empty(1) and not bool(decoder.model.get_parameter(first).any()), "the same one"
        assert empty(1) and not empty(0)
    with decoder.open(0):
        assert torch.equal(decoder.model.get_parameter(first), kept.model.get_parameter(first))


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
