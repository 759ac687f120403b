"""A model without its large weights, for the graph sources, and the graph that a source makes of it.

A source never looks at the values of block linears, embedding and head, and we store those ourselves. So
it gets *stand-ins*: one row that a stride of zero repeats, which takes no memory however often it is
transposed or passed on. An initializer that still lies where a stand-in lies is that weight, whatever the
source calls it. One that was computed from a weight would have to be computed by us too: stand-ins consist
of a NaN that arithmetic and copying keep, so that such an initializer is found and refused.

Runs in the process of a graph source, see `graph`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from transformers import PreTrainedConfig, PreTrainedModel

from losa_deploy.assemble import set_parameter
from losa_deploy.errors import InputError
from losa_deploy.pretrained import empty_model
from losa_deploy.sources.checkpoint import Checkpoint

from .graph import MODEL_FILE
from .weights import NAME, TURNED, large_weights

DATA_FILE = f"{MODEL_FILE}.data"
UNKNOWN = 0x7FC1D05A
"""Bits of the f32 NaN that stand-ins consist of: not the one that arithmetic makes of numbers."""


@dataclass(frozen=True)
class HollowModel:
    """A causal LM in f32 with stand-ins for its large weights; everything else is the checkpoint's."""

    model: PreTrainedModel
    tensors: dict[int, str]
    """Address of a stand-in → the tensor that it stands for. Valid as long as `model` is there."""

    def save(self, graph: ir.Model, folder: Path) -> None:
        """Write what a source made of the model: `model.onnx`, and the data of what it made itself.

        Initializers that are stand-ins have metadata instead of values, see `weights`. Raises `InputError`
        for one that was computed from a stand-in.
        """
        own = []
        for value in graph.graph.initializers.values():
            if value.const_value is None:
                raise InputError(f"The graph has no value for {value.name}.", hint="Report this.")
            array = value.const_value.numpy()
            marker = self._marker(str(value.name), array)
            if marker is None:
                _require_known(str(value.name), array)
                own.append(value)
            else:
                value.const_value = marker
        tensors = [value.const_value for value in own if value.const_value is not None]
        stored = ir.external_data.convert_tensors_to_external(tensors, folder, DATA_FILE)
        for value, tensor in zip(own, stored, strict=True):
            value.const_value = tensor
        ir.save(graph, folder / MODEL_FILE)

    def _marker(self, name: str, array: NDArray[np.generic]) -> ir.ExternalTensor | None:
        """What is saved in the place of a stand-in; None for any other array."""
        tensor = self.tensors.get(array.__array_interface__["data"][0])
        if tensor is None:
            return None
        shape = tuple(self.model.get_parameter(tensor).shape)
        straight = array.shape == shape and array.strides == _strides(array)
        turned = array.T.shape == shape and array.T.strides == _strides(array.T)
        if not straight and not turned:
            return None
        data = {NAME: tensor} if straight else {NAME: tensor, TURNED: "yes"}
        kind, dims = ir.DataType.FLOAT, ir.Shape(array.shape)
        return ir.ExternalTensor(tensor, None, None, kind, shape=dims, name=name, metadata_props=data)


def hollow_model(checkpoint: Checkpoint, config: PreTrainedConfig) -> HollowModel:
    """The model of a checkpoint by a configuration, which may differ from its own in what has no weights.

    Raises `InputError` if the checkpoint lacks a tensor.
    """
    # A head that is stored beside the embedding is one of its own, see `Checkpoint.tied`.
    config.tie_word_embeddings = checkpoint.tied
    with init_empty_weights(include_buffers=False):
        model = empty_model(config)
    large = large_weights(checkpoint)
    elsewhere = set(model.all_tied_weights_keys) if checkpoint.tied else set()
    for name, parameter in list(model.named_parameters()):
        if name in large:
            set_parameter(model, name, _stand_in(parameter.shape))
        elif name not in elsewhere:
            set_parameter(model, name, torch.from_numpy(checkpoint.array(name)))
    model.tie_weights()
    model.requires_grad_(False)
    return HollowModel(model, {model.get_parameter(name).data_ptr(): name for name in large})


def _stand_in(shape: torch.Size) -> torch.Tensor:
    """[out, in] without memory; rows differ from columns by their stride, so that a transposed one shows."""
    row = torch.full(shape[-1:], UNKNOWN, dtype=torch.int32).view(torch.float32)
    return row.expand(shape)


def _strides(array: NDArray[np.generic]) -> tuple[int, int]:
    """Those of a stand-in that is not transposed."""
    return (0, array.itemsize)


def _require_known(name: str, array: NDArray[np.generic]) -> None:
    """Raise if an array holds the stand-ins' NaN."""
    if array.dtype == np.float32 and bool((array.view(np.uint32) == UNKNOWN).any()):
        raise InputError(
            f"The graph source computes {name} from the weights of the model, which it does not get.",
            hint="Install the versions of its libraries that losa-deploy was tested with.",
        )
