"""Graph source for models that onnxruntime-genai's builder does not know: `transformers.exporters`.

Run as `python -m losa_deploy.exporters.onnx.trace MODEL_FOLDER OUTPUT_FOLDER [plain]`; writes
`model.onnx`, its data and a `genai_config.json`. `plain` leaves the fusions for ONNX Runtime out, so
that the graph has standard operators only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.exporters import onnxruntime_fusions
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from losa_deploy.attention import head_size
from losa_deploy.pretrained import cache_argument, load_config
from losa_deploy.sources.checkpoint import Checkpoint

from .stand_ins import hollow_model

PACKING = "_pack_sibling_matmuls"
"""The fusion that concatenates the weights of linears with one input, which we store one by one."""


def trace(folder: Path, target: Path, *, plain: bool) -> None:
    """Export the causal LM in `folder` with a key/value cache of any length, from zero on."""
    checkpoint = Checkpoint.open(folder)
    hollow = hollow_model(checkpoint, _traceable(folder))
    _call_once(hollow.model, checkpoint.family.blocks)
    _leave_out(PACKING)
    settings = OnnxConfig(dynamic=True, ort_fusions=None if plain else "cpu")
    exporter = OnnxExporter()  # type: ignore[no-untyped-call]
    exported = exporter.export(hollow.model, _sample_inputs(hollow.model), config=settings)
    hollow.save(exported.program, target)
    config = genai_config(hollow.model.config.to_dict(), past_shared=False)
    (target / "genai_config.json").write_text(json.dumps(config, indent=4) + "\n", "utf-8")


def _call_once(model: PreTrainedModel, blocks: str) -> None:
    """Call the model without its blocks, because the first call makes what is a constant in later ones.

    `longrope` makes its second set of frequencies so.
    """
    path, _, name = blocks.rpartition(".")
    decoder = model.get_submodule(path)
    kept = decoder.get_submodule(name)
    setattr(decoder, name, torch.nn.ModuleList())
    with torch.no_grad():
        decoder(torch.zeros(1, 1, dtype=torch.long))
    setattr(decoder, name, kept)


def _leave_out(fusion: str) -> None:
    """Remove a step of the fusions for ONNX Runtime, which has no option for that."""
    steps = onnxruntime_fusions._STEPS
    kept = tuple(step for step in steps if getattr(step[0], "__name__", "") != fusion)
    onnxruntime_fusions._STEPS = kept  # type: ignore[assignment]


def _traceable(folder: Path) -> PreTrainedConfig:
    """The configuration, without branches that depend on the length of a sequence.

    `dynamic` positions are scaled beyond `max_position_embeddings` only, which no sequence exceeds.
    """
    config = load_config(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return config


def _sample_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor | Cache]:
    """Two sequences of three tokens after a past of four, so that no dimension looks like a constant."""
    # Without a configuration the cache keeps all tokens in every block, also those outside a window:
    # the runtimes' caches do, and the graph masks them. One that drops them counts them in Python.
    past, config = DynamicCache(), model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for block in range(config.num_hidden_layers):
        past.update(*torch.zeros(2, 2, heads, 4, head_size(config)), block)
    return {
        "input_ids": torch.arange(6, dtype=torch.long).reshape(2, 3),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        cache_argument(model): past,
    }


def genai_config(config: Mapping[str, object], *, past_shared: bool) -> dict[str, object]:
    """The runtime's description of a decoder, from a `config.json`."""
    heads, hidden = int(str(config["num_attention_heads"])), int(str(config["hidden_size"]))
    context = int(str(config["max_position_embeddings"]))
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config.get("head_dim") or hidden // heads,
        "hidden_size": hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    eos = config.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = config.get("pad_token_id")
    model = {
        "bos_token_id": config.get("bos_token_id") or 0,
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
        "type": "decoder",
        "vocab_size": config["vocab_size"],
    }
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": past_shared}
    return {"model": model, "search": search}


if __name__ == "__main__":
    trace(Path(sys.argv[1]), Path(sys.argv[2]), plain=sys.argv[3:] == ["plain"])
