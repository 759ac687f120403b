"""The importance of every input column for llama.cpp's quantizer: the mean of its squared activations.

That is what llama.cpp's own `llama-imatrix` collects. Its types below 3.5 bits per weight are made for it
and refuse to be written without. Here the activations are those of the dense model in torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from losa_deploy.errors import InputError
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import CalibrationRecipe
from losa_deploy.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

REQUIRED = ("iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "q2_k_s")
"""Types that llama.cpp does not write without importances."""


def importance(
    source: Checkpoint, calibration: CalibrationRecipe, seed: int = 0, progress: Progress = no_progress
) -> dict[str, NDArray[np.float32]]:
    """Block linear → mean of x² of each input [in] over the calibration text, f32."""
    import torch

    from losa_deploy.compress.calibrate import calibration_tokens
    from losa_deploy.compress.decoder import Decoder

    dense = Decoder(source).keep()
    tokens = calibration_tokens(source, calibration, seed, "f32", progress)
    sums = {name: torch.zeros(shape[1], dtype=torch.float64) for name, shape in source.linears.items()}
    hooks = [dense.linear(name).register_forward_pre_hook(_adder(total)) for name, total in sums.items()]
    try:
        with torch.no_grad():
            for done, row in enumerate(tokens):
                progress(done, len(tokens), "importance of the inputs")
                dense.logits(row[None])
    finally:
        for hook in hooks:
            hook.remove()
    progress(len(tokens), len(tokens), "importance of the inputs")
    return {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}


def _adder(total: torch.Tensor) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        total.add_(x.reshape(-1, x.shape[-1]).square().sum(dim=0))

    return hook


def gguf_names(model: Path, linears: Mapping[str, object], blocks: int) -> dict[str, str]:
    """Block linear → the name of its tensor in the GGUF file `model`.

    Raises `InputError` for an architecture or a linear that the `gguf` package does not know.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    from losa_deploy.sources.gguf import read_header

    architecture = read_header(model).architecture
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(known[architecture], blocks) if architecture in known else None
    names = {linear: table.get_name(linear) if table else None for linear in linears}
    missing = [linear for linear, name in names.items() if name is None]
    if missing:
        raise InputError(
            f"{missing[0]} has no name in a GGUF file of the architecture {architecture!r}.",
            hint="Choose a type that needs no importances, e.g. q2_k.",
        )
    return {linear: f"{name}.weight" for linear, name in names.items()}


def importance_file(
    source: Checkpoint,
    model: Path,
    calibration: CalibrationRecipe,
    folder: Path,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Path:
    """A file of tensor name in the GGUF file `model` → importance [in], f32; reused if `folder` has it.

    The name of the file is made of the model's weights and the calibration.
    """
    from losa_deploy.manifest import sha256_file

    spec = [sha256_file(model), calibration.model_dump(mode="json"), seed]
    digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
    path = folder / f"importance-{digest}.safetensors"
    if not path.is_file():
        names = gguf_names(model, source.linears, source.block_count)
        found = importance(source, calibration, seed, progress)
        partial = path.with_suffix(".partial")
        save_file({names[linear]: weights for linear, weights in found.items()}, partial)
        partial.rename(path)
    return path
