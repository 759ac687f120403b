"""Which layout and value type each tensor of an ONNX artifact gets, from headers and masks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from losa_deploy.interfaces import ExportPlan, MaskOf, PlannedTensor, Shapes
from losa_deploy.layouts import LAYOUTS, Choice, PackOptions, choose, forced
from losa_deploy.layouts.dense import dense_size
from losa_deploy.model import WeightGrid
from losa_deploy.planned import each_shape_once, packing_bytes
from losa_deploy.recipe import ExportRecipe, ValueType
from losa_deploy.sources.checkpoint import Checkpoint

from .graph import MODEL_FILE
from .sizes import file_sizes
from .writer import DATA_FILE

RUNTIME_BYTES = 700_000_000
"""What the process of a graph source takes, and this one before it packs."""


@dataclass(frozen=True)
class Job:
    """What is exported: a checkpoint, its masks, and how."""

    checkpoint: Checkpoint
    recipe: ExportRecipe
    mask: Callable[[str], NDArray[np.bool_]]
    """Linear → mask [out, in], True = kept."""
    grid: Callable[[str], WeightGrid | None] = lambda linear: None
    """Linear → the grid that it was trained on, if any."""

    @property
    def other(self) -> Mapping[str, tuple[str, tuple[int, int]]]:
        """Module name → (tensor, shape (rows, columns)) of embedding and head; tied, they are one."""
        family, checkpoint = self.checkpoint.family, self.checkpoint
        names = [family.embedding] if checkpoint.tied else [family.embedding, family.head]
        result = {}
        for name in names:
            rows, columns = checkpoint.shape(f"{name}.weight")
            result[name] = (f"{name}.weight", (rows, columns))
        return result


def linear_options(recipe: ExportRecipe) -> PackOptions:
    """How block values are stored; `portable` means f32."""
    value_type: ValueType = "f32" if recipe.portable else recipe.value_type
    return PackOptions(value_type, recipe.group_size, search=True)


def table_options(recipe: ExportRecipe) -> PackOptions:
    """How embedding and head are stored; `portable` means f32."""
    return PackOptions("f32" if recipe.portable else recipe.table_type, recipe.group_size)


def linear_tensor(recipe: ExportRecipe, name: str, mask: NDArray[np.bool_]) -> PlannedTensor:
    """Layout of one linear; raises `UsageError` naming it if a forced layout cannot represent it."""
    picked = _choice(recipe, name, mask)
    return PlannedTensor(
        name,
        (mask.shape[0], mask.shape[1]),
        picked.layout,
        picked.options.value_type,
        int(mask.sum()),
        picked.bytes,
        picked.reason,
        picked.options.pattern,
        picked.options.rows_per_mask,
    )


def _choice(recipe: ExportRecipe, name: str, mask: NDArray[np.bool_]) -> Choice:
    options = linear_options(recipe)
    if recipe.portable:
        return Choice(
            "dense", options, LAYOUTS["dense"].size(mask, options), "portable: standard operators only"
        )
    if recipe.layout == "auto":
        return choose(mask, options)
    return forced(recipe.layout, name, mask, options)


def table_tensor(recipe: ExportRecipe, name: str, shape: tuple[int, int], *, tied: bool) -> PlannedTensor:
    """The embedding or the head; `tied`: it is both."""
    options = table_options(recipe)
    reason = "shared by embedding and head" if tied else "embedding and head stay dense"
    size = dense_size(shape, options)
    return PlannedTensor(name, shape, "dense", options.value_type, shape[0] * shape[1], size, reason)


def planned(job: Job) -> Iterator[PlannedTensor]:
    """Every linear in block order, then embedding and head."""
    for name in job.checkpoint.linears:
        yield linear_tensor(job.recipe, name, job.mask(name))
    for name, (_, shape) in job.other.items():
        yield table_tensor(job.recipe, name, shape, tied=job.checkpoint.tied)


def estimate(
    linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
) -> Mapping[str, tuple[PlannedTensor, ...]]:
    """The data file of a model with these shapes; the graph is small."""
    tensors = [*each_shape_once(linears, lambda name, shape: linear_tensor(recipe, name, mask(shape)))]
    tied = len(others) == 1
    tensors += [table_tensor(recipe, name, shape, tied=tied) for name, shape in others.items()]
    return {DATA_FILE: tuple(tensors)}


def packing_options(job: Job, tensor: PlannedTensor) -> PackOptions:
    """How a planned tensor is packed, but for the scales of its grid."""
    chosen = table_options if tensor.name in job.other else linear_options
    return replace(
        chosen(job.recipe),
        value_type=tensor.value_type,
        pattern=tensor.pattern,
        rows_per_mask=tensor.rows_per_mask,
    )


def siblings(checkpoint: Checkpoint) -> Iterator[tuple[str, ...]]:
    """All linears in order, those of a block that read the same input together."""
    for block in range(checkpoint.block_count):
        prefix = f"{checkpoint.family.blocks}.{block}."
        for names in checkpoint.family.linears:
            yield tuple(prefix + name for name in names)


def _file_sizes(job: Job, tensors: Mapping[str, PlannedTensor]) -> tuple[int, int]:
    """Bytes of `model.onnx` and of its data file."""
    options = {name: packing_options(job, tensor) for name, tensor in tensors.items()}
    parts = {}
    for name, tensor in tensors.items():
        mask = np.ones(tensor.shape, np.bool_) if name in job.other else job.mask(name)
        parts[name] = LAYOUTS[tensor.layout].sizes(mask, options[name])
    groups = [[tensors[name] for name in names] for names in siblings(job.checkpoint)]
    tables = [tensors[name] for name in job.other]
    return file_sizes(job.checkpoint, groups, tables, parts, options, plain=job.recipe.portable)


def plan(job: Job) -> ExportPlan:
    """Files and bytes: exact for packed tensors, see `sizes` for the rest."""
    tensors = tuple(planned(job))
    graph, data = _file_sizes(job, {tensor.name: tensor for tensor in tensors})
    files = {MODEL_FILE: graph, DATA_FILE: data}
    for path in sorted(job.checkpoint.folder.glob("*.json")):
        if path.name.startswith(("tokenizer", "config", "generation", "special", "vocab", "added")):
            files[path.name] = path.stat().st_size
    tables = [shape for _, shape in job.other.values()]
    peak = RUNTIME_BYTES + packing_bytes(job.checkpoint.linears.values(), tables)
    return ExportPlan("onnx", job.recipe, files, tensors, peak)
