"""Reads an exported GGUF back: module → weight, in the row order of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.families import find_family
from losa_deploy.gguf_file import GgufFile, Tensor, open_gguf
from losa_deploy.gguf_view import PREFIX, expanded
from losa_deploy.manifest import TensorRecord
from losa_deploy.pretrained import full_config

from .architecture import ARCHITECTURES, row_order, weight_name


def decode(path: Path, folder: Path, records: Iterable[TensorRecord]) -> dict[str, NDArray[np.float32]]:
    """Module → weight [out, in] as the bytes of a file of the artifact in `folder` define it."""
    config = full_config(folder)
    family, kind = find_family(config), ARCHITECTURES[str(config["model_type"])]
    weights: dict[str, NDArray[np.float32]] = {}
    with open_gguf(path) as file:
        tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in file.tensors}
        for record in records:
            tensor = tensors.get(weight_name(family, record.name))
            if tensor is None:
                raise InputError(f"{file.path} does not hold {record.name}.", hint="Export the model again.")
            rows, columns = record.shape
            weight = _matrix(file, tensor, rows, columns)
            order = row_order(config, kind, record.name, rows)
            if order is not None:
                weight[order] = weight.copy()
            weights[record.name] = weight
    return weights


def _matrix(file: GgufFile, tensor: Tensor, rows: int, columns: int) -> NDArray[np.float32]:
    weight = np.concatenate(list(expanded(file, tensor)))
    if weight.size != rows * columns:
        raise InputError(
            f"{file.path}: {tensor.name} holds {weight.size} weights, losa.json says {rows} x {columns}.",
            hint="Export the model again.",
        )
    return weight.reshape(rows, columns)
