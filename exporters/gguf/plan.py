"""What each tensor of a GGUF becomes, from headers and masks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from losa_deploy import layouts
from losa_deploy.gguf.dense import VALUE_TYPES, dense_type, is_narrower, stock_type
from losa_deploy.gguf.names import PREFIX
from losa_deploy.gguf.types import F32, WeightType
from losa_deploy.gguf.view import declared
from losa_deploy.interfaces import ExportPlan, PlannedTensor
from losa_deploy.layouts import Choice, choose, forced
from losa_deploy.layouts.blob import blob_bytes
from losa_deploy.model import WeightGrid
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


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    source: str
    """Tensor of the checkpoint; empty for one that is computed."""
    name: str
    """In the file; a packed one has the prefix `losa.`."""
    shape: tuple[int, ...]
    bytes: int
    dense: WeightType
    """Type of a dense tensor."""
    choice: Choice | None
    """How it is packed; None for a dense tensor."""
    kept: int
    reason: str

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

    @property
    def head_value_type(self) -> str:
        """Of embedding and head."""
        follows = layouts.VALUE_TYPES[self.recipe.value_type].head
        return follows if self.recipe.head == "same" else self.recipe.head

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

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors in the order of the file."""
        names = tensor_names(self.checkpoint, self.architecture)
        found = [self._entry(source, name) for source, name in names.items()]
        if Rope.of(self.checkpoint.config).kind == "llama3":
            width = head_dim(self.checkpoint.config) // 2
            found.append(Entry("", ROPE, (width,), 4 * width, F32, None, width, ""))
        return tuple(found)

    def _entry(self, source: str, name: str) -> Entry:
        shape = self.checkpoint.shape(source)
        module = source.rpartition(".")[0]
        if len(shape) == 1:
            return Entry(source, name, shape, 4 * shape[0], F32, None, shape[0], "")
        matrix = (shape[0], shape[1])
        if module not in self.checkpoint.linears:
            kind = dense_type(self.head_value_type, shape[1])
            tied = self.checkpoint.tied
            reason = "embedding, shared with the head" if tied else "embedding and head stay dense"
            return self._dense(source, name, matrix, kind, prod(shape), reason)
        mask = self.mask(module)
        kept = int(mask.sum())
        kind = dense_type(self.recipe.value_type, shape[1])
        if self.kind == "portable":
            return self._dense(source, name, matrix, kind, kept, DENSE_REASON)
        order = self.architecture.row_order(self.checkpoint.config, module, shape[0])
        mask = mask if order is None else mask[order]  # pairs of rows share a stream
        picked = packing(self.recipe, module, mask)
        size = blob_bytes(picked.layout, mask, picked.options)
        blob = self.recipe.layout == "dense" or is_narrower(self.recipe.value_type)
        if picked.layout == "dense" and not blob:
            return self._dense(source, name, matrix, kind, kept, picked.reason)
        if declared(matrix) is None:
            return self._dense(
                source, name, matrix, kind, kept, "fewer weights than the header of a packed one"
            )
        return Entry(source, f"{PREFIX}{name}", shape, size, F32, picked, kept, picked.reason)

    def _dense(
        self, source: str, name: str, shape: tuple[int, int], kind: WeightType, kept: int, reason: str
    ) -> Entry:
        return Entry(source, name, shape, kind.nbytes(prod(shape)), kind, None, kept, reason)

    def order(self, entry: Entry) -> NDArray[np.intp] | None:
        """How the rows of a tensor are reordered, None if they stay."""
        return self.architecture.row_order(self.checkpoint.config, entry.module, entry.shape[0])


def packing(recipe: ExportRecipe, linear: str, mask: NDArray[np.bool_]) -> Choice:
    """Layout of a packed linear; raises `UsageError` naming it if a forced one cannot represent it."""
    options = pack_options(recipe.value_type, recipe.group_size)
    if recipe.layout == "auto":
        return choose(mask, options)
    return forced(recipe.layout, linear, mask, options)


def planned(job: Job) -> Iterator[PlannedTensor]:
    """Every linear in block order, then embedding and head."""
    entries = {entry.module: entry for entry in job.entries if len(entry.shape) == 2}
    for module in (*job.checkpoint.linears, *(n for n in entries if n not in job.checkpoint.linears)):
        entry = entries[module]
        if entry.choice is not None:
            layout, value_type, size = (
                entry.choice.layout,
                entry.choice.options.value_type,
                entry.choice.bytes,
            )
        else:
            layout, value_type, size = "dense", VALUE_TYPES[entry.dense], entry.bytes
        reason = entry.reason if entry.choice else f"{entry.dense.name}; {entry.reason}"
        yield PlannedTensor(module, entry.shape, layout, value_type, entry.kept, size, reason)


def plan(jobs: tuple[Job, ...]) -> ExportPlan:
    """Files and bytes of one or two files; the tensors are those of the first."""
    checkpoint = jobs[0].checkpoint
    header = HEADER_BYTES
    for name, share in TOKENIZER_SHARE.items():
        path = checkpoint.folder / name
        header += int(share * path.stat().st_size) if path.is_file() else 0
    files = {job.file: header + sum(entry.bytes + 64 for entry in job.entries) for job in jobs}
    largest = max(prod(entry.shape) for entry in jobs[0].entries)
    return ExportPlan("gguf", files, tuple(planned(jobs[0])), LIBRARY_BYTES + 12 * largest)
