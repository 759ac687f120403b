"""Initializers whose values are a checkpoint's: the graph says which tensor, which is read when needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from losa_deploy.sources.checkpoint import Checkpoint

NAME, TURNED = "losa.tensor", "losa.transposed"
"""What the metadata of such an initializer says, until it is packed: tensor and, if transposed, anything."""


@dataclass(frozen=True)
class Weight:
    """A matrix of a checkpoint as a graph has it."""

    checkpoint: Checkpoint
    name: str
    """The tensor, [out, in]."""
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As the graph has it, from the header only."""
        shape = self.checkpoint.shape(self.name)
        return shape[::-1] if self.transposed else shape

    def array(self) -> NDArray[np.float32]:
        """Its values, read now."""
        array = self.checkpoint.array(self.name)
        return array.T if self.transposed else array


def large_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors with nearly all bytes of a model: block linears, embedding, a head that is not tied."""
    family = checkpoint.family
    ends = [family.embedding] if checkpoint.tied else [family.embedding, family.head]
    return frozenset(f"{module}.weight" for module in (*checkpoint.linears, *ends))


def weights_of(initializers: Iterable[onnx.TensorProto], checkpoint: Checkpoint) -> Mapping[str, Weight]:
    """Initializer → the weight of `checkpoint` that its metadata names; the others are left out."""
    found = {}
    for tensor in initializers:
        entries = {entry.key: entry.value for entry in tensor.metadata_props}
        if NAME in entries:
            found[tensor.name] = Weight(checkpoint, entries[NAME], TURNED in entries)
    return found
