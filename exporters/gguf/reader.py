"""Reads an exported GGUF back: module → weight, in the row order of the Hugging Face model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.families import find_family
from losa_deploy.gguf.file import GgufFile, Tensor, open_gguf
from losa_deploy.gguf.names import PREFIX
from losa_deploy.gguf.view import expanded
from losa_deploy.lazy import Lazy
from losa_deploy.manifest import TensorRecord
from losa_deploy.pretrained import full_config

from .architectures import find_architecture, weight_name


def decode(path: Path, folder: Path, records: Iterable[TensorRecord]) -> Lazy:
    """Module → weight [out, in] as the bytes of a file of the artifact in `folder` define it.

    The file is open as long as this mapping, or another made of it, lives.
    """
    config = full_config(folder)
    family, kind = find_family(config), find_architecture(config)
    weights: dict[str, Callable[[], NDArray[np.float32]]] = {}
    with ExitStack() as stack:
        file = stack.enter_context(open_gguf(path))
        tensors = {tensor.name.removeprefix(PREFIX): tensor for tensor in file.tensors}
        for record in records:
            tensor = tensors.get(weight_name(kind, family, record.name))
            if tensor is None:
                raise InputError(f"{file.path} does not hold {record.name}.", hint="Export the model again.")
            rows, columns = record.shape
            order = kind.row_order(config, record.name, rows)
            weights[record.name] = partial(_matrix, file, tensor, (rows, columns), order)
        weakref.finalize(file, stack.pop_all().close)
    return Lazy(weights)


def _matrix(
    file: GgufFile, tensor: Tensor, shape: tuple[int, int], order: NDArray[np.intp] | None
) -> NDArray[np.float32]:
    """The weight, its row i being row `order[i]` of the module."""
    weight = np.concatenate(list(expanded(file, tensor)))
    rows, columns = shape
    if weight.size != rows * columns:
        raise InputError(
            f"{file.path}: {tensor.name} holds {weight.size} weights, losa.json says {rows} x {columns}.",
            hint="Export the model again.",
        )
    result = weight.reshape(rows, columns)
    if order is not None:
        result[order] = result.copy()
    return result
