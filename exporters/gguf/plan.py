"""What each tensor of a GGUF becomes, from headers and masks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from losa_deploy.gguf.dense import VALUE_TYPES, dense_gguf_bytes, dense_type, is_narrower, stock_type
from losa_deploy.gguf.names import PREFIX
from losa_deploy.gguf.types import F32, I8, GgmlType
from losa_deploy.gguf.view import declared
from losa_deploy.interfaces import ExportPlan, MaskOf, PlannedTensor, Shapes
from losa_deploy.layouts import Choice, PackOptions, choose, forced
from losa_deploy.layouts.blob import blob_bytes
from losa_deploy.model import WeightGrid
from losa_deploy.planned import each_shape_once
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint

from .architectures import Architecture, Rope, architecture, head_dim, tensor_names
from .naming import file_name
from .values import pack_options

Kind = Literal["portable", "packed"]
ROPE = "rope_freqs.weight"
LIBRARY_BYTES = 700_000_000
"""Resident size of numpy, torch and transformers beside the tensor at hand."""
HEADER_BYTES = 50_000
TOKENIZER_SHARE = {"tokenizer.json": 0.5, "tokenizer.model": 1.0}
"""Rough size of the keys: of a tokenizer file so much is found in the header."""
DENSE_REASON = "portable: dense with its zeros, no smaller than an unpruned one"


def linear_tensor(recipe: ExportRecipe, kind: Kind, name: str, mask: NDArray[np.bool_]) -> PlannedTensor:
    """How one linear is stored; `mask` [out, in] has its rows in the order of the file.

    Raises `UsageError` naming it if a forced layout cannot represent it.
    """
    shape, kept = (mask.shape[0], mask.shape[1]), int(mask.sum())
    if kind == "portable":
        return _dense(name, shape, recipe.value_type, kept, DENSE_REASON)
    picked = _choice(recipe, name, mask)
    if picked.layout == "dense" and not _dense_blobs(recipe):
        return _dense(name, shape, recipe.value_type, kept, picked.reason)
    if declared(shape) is None:
        return _dense(name, shape, recipe.value_type, kept, "fewer weights than the header of a packed one")
    options = picked.options
    return PlannedTensor(
        name,
        shape,
        picked.layout,
        options.value_type,
        kept,
        picked.bytes,
        picked.reason,
        options.pattern,
        options.rows_per_mask,
    )


def _dense_blobs(recipe: ExportRecipe) -> bool:
    """Whether dense linears of a packed file are blobs: if asked for, or smaller than stock tensors."""
    return recipe.layout == "dense" or is_narrower(recipe.value_type)


def _choice(recipe: ExportRecipe, name: str, mask: NDArray[np.bool_]) -> Choice:
    options = pack_options(recipe.value_type, recipe.group_size)
    return choose(mask, options) if recipe.layout == "auto" else forced(recipe.layout, name, mask, options)


def table_tensor(recipe: ExportRecipe, name: str, shape: tuple[int, int], *, tied: bool) -> PlannedTensor:
    """The embedding or the head; `tied`: it is both."""
    reason = "embedding, shared with the head" if tied else "embedding and head stay dense"
    return _dense(name, shape, recipe.table_type, shape[0] * shape[1], reason)


def _dense(name: str, shape: tuple[int, int], value_type: str, kept: int, reason: str) -> PlannedTensor:
    """A tensor of llama.cpp's own type for these values, or of the nearest that its columns allow."""
    kind = dense_type(value_type, shape[1])
    size = dense_gguf_bytes(value_type, shape)
    return PlannedTensor(name, shape, "dense", VALUE_TYPES[kind], kept, size, f"{kind.name}; {reason}")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    source: str
    """Tensor of the checkpoint; empty for one that is computed."""
    name: str
    """In the file; a packed one has the prefix `losa.`."""
    shape: tuple[int, ...]
    bytes: int
    type: GgmlType
    """In the file; a packed one has the bytes of a blob."""
    planned: PlannedTensor | None = None
    """Of a matrix."""
    options: PackOptions | None = None
    """How it is packed; None for a dense tensor."""

    @property
    def module(self) -> str:
        return self.source.rpartition(".")[0]


@dataclass(frozen=True)
class Job:
    """One file: a checkpoint, its masks, and how."""

    checkpoint: Checkpoint
    recipe: ExportRecipe
    mask: Callable[[str], NDArray[np.bool_]]
    """Linear → mask [out, in], True = kept."""
    kind: Kind
    model: str
    """Identity of the source, for the name of the file."""
    grid: Callable[[str], WeightGrid | None] = lambda linear: None
    """Linear → the grid that it was trained on, if any."""

    @cached_property
    def architecture(self) -> Architecture:
        return architecture(self.checkpoint)

    @cached_property
    def parameters(self) -> int:
        return sum(
            prod(self.checkpoint.shape(name)) for name in tensor_names(self.checkpoint, self.architecture)
        )

    @cached_property
    def file(self) -> str:
        """Name of the file."""
        value_type = self.recipe.value_type
        label = f"LOSA-{value_type.upper()}" if self.kind == "packed" else stock_type(value_type).name
        return file_name(self.model, self.parameters, label)

    def planned(self) -> Iterator[PlannedTensor]:
        """Every linear in block order, then embedding and head."""
        for name in self.checkpoint.linears:
            yield linear_tensor(self.recipe, self.kind, name, self._stored_mask(name))
        for source in tensor_names(self.checkpoint, self.architecture):
            module, shape = source.rpartition(".")[0], self.checkpoint.shape(source)
            if len(shape) == 2 and module not in self.checkpoint.linears:
                size = (shape[0], shape[1])
                yield table_tensor(self.recipe, module, size, tied=self.checkpoint.tied)

    def entries(self, planned: Mapping[str, PlannedTensor]) -> tuple[Entry, ...]:
        """All tensors in the order of the file, the matrices as planned."""
        names = tensor_names(self.checkpoint, self.architecture)
        found = [self._entry(source, name, planned) for source, name in names.items()]
        if Rope.of(self.checkpoint.config).kind == "llama3":
            width = head_dim(self.checkpoint.config) // 2
            found.append(Entry("", ROPE, (width,), 4 * width, F32))
        return tuple(found)

    def _entry(self, source: str, name: str, planned: Mapping[str, PlannedTensor]) -> Entry:
        shape = self.checkpoint.shape(source)
        if len(shape) == 1:
            return Entry(source, name, shape, 4 * shape[0], F32)
        module = source.rpartition(".")[0]
        tensor = planned[module]
        if not self._is_packed(tensor):
            return Entry(source, name, shape, tensor.bytes, stock_type(tensor.value_type), tensor)
        options = replace(
            pack_options(tensor.value_type, self.recipe.group_size),
            pattern=tensor.pattern,
            rows_per_mask=tensor.rows_per_mask,
        )
        size = blob_bytes(tensor.layout, self._stored_mask(module), options)
        return Entry(source, f"{PREFIX}{name}", shape, size, I8, tensor, options)

    def _is_packed(self, tensor: PlannedTensor) -> bool:
        """Whether a planned tensor is a blob."""
        if self.kind == "portable" or tensor.name not in self.checkpoint.linears:
            return False
        wanted = tensor.layout != "dense" or _dense_blobs(self.recipe)
        return wanted and declared(tensor.shape) is not None

    def _stored_mask(self, module: str) -> NDArray[np.bool_]:
        """The mask with its rows in the order of the file: pairs of rows share a stream."""
        mask = self.mask(module)
        order = self.order(module, mask.shape[0])
        return mask if order is None else mask[order]

    def order(self, module: str, rows: int) -> NDArray[np.intp] | None:
        """How the rows of a tensor are reordered, None if they stay."""
        return self.architecture.row_order(self.checkpoint.config, module, rows)


def estimate(
    linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf, kinds: Sequence[Kind]
) -> Mapping[str, tuple[PlannedTensor, ...]]:
    """The files of a model with these shapes, by kind."""
    tied = len(others) == 1
    tables = [table_tensor(recipe, name, shape, tied=tied) for name, shape in others.items()]

    def planned(kind: Kind) -> Iterator[PlannedTensor]:
        yield from each_shape_once(
            linears, lambda name, shape: linear_tensor(recipe, kind, name, mask(shape))
        )
        yield from tables

    return {f"{kind} .gguf": tuple(planned(kind)) for kind in kinds}


def plan(jobs: tuple[Job, ...]) -> ExportPlan:
    """Files and bytes of one or two files; the tensors are those of the first."""
    checkpoint = jobs[0].checkpoint
    header = HEADER_BYTES
    for name, share in TOKENIZER_SHARE.items():
        path = checkpoint.folder / name
        header += int(share * path.stat().st_size) if path.is_file() else 0
    planned = [tuple(job.planned()) for job in jobs]
    files = {}
    for job, tensors in zip(jobs, planned, strict=True):
        entries = job.entries({tensor.name: tensor for tensor in tensors})
        files[job.file] = header + sum(entry.bytes + 64 for entry in entries)
        largest = max(prod(entry.shape) for entry in entries)
    return ExportPlan("gguf", jobs[0].recipe, files, planned[0], LIBRARY_BYTES + 12 * largest)
