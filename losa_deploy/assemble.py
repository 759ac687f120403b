"""A model put together from a checkpoint's own tensors, and the check that they are what it needs.

transformers loads with patience: it makes up what is missing and leaves out what it does not know. Here a
missing tensor, another shape, another number of blocks, or a type that cannot be pruned is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.errors import InputError
from losa_deploy.pretrained import empty_model, first_line, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYPES = ("F32", "F16", "BF16")
"""Stored types that are exact in f32."""


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the headers of the weight files with what the configuration asks for; reads no weights.

    Raises `InputError` naming the first tensor that is missing, has another shape or an unusable type.
    """
    if checkpoint.config.get("quantization_config") is not None:
        raise InputError(
            f"{checkpoint.folder} holds quantized weights (config.json has a quantization_config).",
            hint="Give the model that it was quantized from.",
        )
    asked = checkpoint.config.get("num_hidden_layers")
    if checkpoint.block_count != asked:
        raise InputError(
            f"{checkpoint.folder} has weights for {checkpoint.block_count} blocks, but config.json asks for "
            f"{asked} (num_hidden_layers).",
            hint="Check that config.json belongs to these weights.",
        )
    for name, expected in _expected(checkpoint).items():
        kind, shape = checkpoint.header(name)
        if shape != expected:
            raise InputError(
                f"{checkpoint.file_of(name)} holds {name} as {_times(shape)}, but config.json asks for "
                f"{_times(expected)}.",
                hint="Check that config.json belongs to these weights.",
            )
        if kind not in TYPES:
            raise InputError(
                f"{checkpoint.file_of(name)} holds {name} as {kind}, expected one of {', '.join(TYPES)}.",
                hint="Save the model as float32, float16 or bfloat16.",
            )


def assemble(checkpoint: Checkpoint, *, attention: str | None = None) -> PreTrainedModel:
    """The causal LM with the tensors of `checkpoint`, read one by one; f32, in evaluation mode.

    Raises `InputError` naming a tensor that is missing or holds NaN or infinity.
    """
    import torch

    config = load_config(checkpoint.folder)
    # A head that is stored beside the embedding is one of its own, see `Checkpoint.tied`.
    config.tie_word_embeddings = checkpoint.tied
    model = empty_model(config, attention=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = checkpoint.tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                wrong = int((~torch.isfinite(tensor)).sum())
                raise InputError(
                    f"{checkpoint.file_of(name)} has {wrong} values in {name} that are NaN or infinite.",
                    hint="Training in half precision leaves such weights; use an earlier checkpoint.",
                )
            parameter.copy_(tensor)
    return model


def _expected(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Parameter → shape, from a model without memory; a tied head only if it is stored."""
    import torch

    config = load_config(checkpoint.folder)
    try:
        with torch.device("meta"):
            model = empty_model(config)
    except Exception as error:  # a configuration that no model can be made of, whatever it breaks first
        raise InputError(
            f"transformers cannot make a model of {checkpoint.folder / 'config.json'}: {first_line(error)}.",
            hint="Copy the model's config.json again.",
        ) from error
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: shape for name, shape in found.items() if name in checkpoint or name not in tied}


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
