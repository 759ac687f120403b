"""A model put together from a checkpoint's own tensors, and the check that they are what it needs.

transformers loads with patience: it makes up what is missing and leaves out what it does not know. Here a
missing tensor, another shape, another number of blocks, or a type that cannot be pruned is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError
from losa_deploy.pretrained import empty_model, first_line, load_config
from losa_deploy.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn
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


def skeleton(
    checkpoint: Checkpoint,
    *,
    attention: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The causal LM of `checkpoint` in evaluation mode, its blocks without memory.

    All but the blocks holds the checkpoint's own tensors, f32 or `dtype`, on the CPU or `device`; see `fill`
    for the blocks. Raises `InputError` as `fill` does.
    """
    from accelerate import init_empty_weights

    config = load_config(checkpoint.folder)
    # A head that is stored beside the embedding is one of its own, see `Checkpoint.tied`.
    config.tie_word_embeddings = checkpoint.tied
    with init_empty_weights(include_buffers=False):
        model = empty_model(config, attention=attention)
    elsewhere = set(model.all_tied_weights_keys) if checkpoint.tied else set()
    inside = f"{checkpoint.family.blocks}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(inside)]
    fill(checkpoint, model, [name for name in names if name not in elsewhere], dtype, device)
    for module in model.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))
    model.tie_weights()
    return model.requires_grad_(False)


def fill(
    checkpoint: Checkpoint,
    model: nn.Module,
    names: Iterable[str],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Give parameters of `model` the tensors of `checkpoint` with their names, f32 or `dtype`.

    On the CPU or `device`.

    Raises `InputError` naming a tensor that is missing or holds NaN or infinity.
    """
    import torch

    for name in names:
        tensor = checkpoint.tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{checkpoint.file_of(name)} has {wrong} values in {name} that are NaN or infinite.",
                hint="Training in half precision leaves such weights; use an earlier checkpoint.",
            )
        set_parameter(model, name, tensor.to(device=device, dtype=dtype or torch.float32))


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter by one of any shape that does not train."""
    from torch import nn

    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


def assemble(checkpoint: Checkpoint, *, attention: str | None = None) -> PreTrainedModel:
    """The whole causal LM with the tensors of `checkpoint`; f32, in evaluation mode; see `fill`."""
    model = skeleton(checkpoint, attention=attention)
    inside = f"{checkpoint.family.blocks}."
    fill(checkpoint, model, [name for name, _ in model.named_parameters() if name.startswith(inside)])
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
