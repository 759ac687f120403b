"""Writes `model.onnx` and its one external data file, with bytes that depend on the model only."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

DATA_FILE = "model.onnx.data"
PAGE = 4096
INLINE_BYTES = 16384
"""Initializers up to this size are stored in the graph: a page of padding each would cost more."""


@dataclass
class Writer:
    """Collects initializers in order; each array is written when it is added, none is kept."""

    folder: Path
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    _end: int = 0

    def __post_init__(self) -> None:
        (self.folder / DATA_FILE).write_bytes(b"")

    def add(self, name: str, array: NDArray[np.generic]) -> str:
        """Store an array: inline if small, else page-aligned in the data file. Returns `name`."""
        array = np.asarray(array, order="C")
        if array.nbytes <= INLINE_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        offset = padded(self._end)
        with (self.folder / DATA_FILE).open("r+b") as handle:
            handle.seek(offset)
            handle.write(array.data)
        self._end = offset + array.nbytes
        self.initializers.append(external(name, array.shape, array.dtype, offset))
        return name


def external(name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic], offset: int) -> onnx.TensorProto:
    """An initializer whose bytes are in the data file."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    size = prod(shape) * dtype.itemsize
    for key, value in (("location", DATA_FILE), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def padded(size: int) -> int:
    """`size` rounded up to a page."""
    return -(-size // PAGE) * PAGE
