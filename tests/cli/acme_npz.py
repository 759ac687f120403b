"""A format and a runtime as somebody else would write them: one .npz file, opened through torch.

`test_strangers.py` copies this file into a package of its own; nothing of losa-deploy knows of it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.card import FormatNotes
from losa_deploy.interfaces import (
    ExportedModel,
    Exporter,
    ExportPlan,
    MaskOf,
    PlannedTensor,
    Runtime,
    Session,
    Shapes,
)
from losa_deploy.manifest import TensorRecord, hash_files
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files, write_weights

FILE = "weights.npz"
ENTRY_BYTES = 400
"""Of the two headers that an array has in a zip file, roughly."""


class NpzExporter(Exporter):
    """All tensors as f32 in one uncompressed file."""

    name = "npz"
    runtime = "npz"
    suffixes = (".npz",)

    def estimate(
        self, linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
    ) -> Mapping[str, tuple[PlannedTensor, ...]]:
        del recipe, others
        return {FILE: tuple(planned(name, mask(shape)) for name, shape in linears.items())}

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        del source, recipe

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        tensors = tuple(planned(name, model.mask(name)) for name in model.linears)
        shapes = [model.checkpoint.shape(name) for name in model.checkpoint.files]
        size = sum(4 * int(np.prod(shape)) + ENTRY_BYTES for shape in shapes)
        return ExportPlan(self.name, recipe, {FILE: size}, tensors, 2 * size)

    def export(self, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress) -> ExportedModel:
        records = write(model.checkpoint, plan.tensors, folder)
        progress(1, 1, FILE)
        effective = model.manifest.recipe.model_copy(update={"export": plan.recipe})
        changes = {"kind": "exported", "format": self.name, "recipe": effective, "linears": records}
        model.manifest.model_copy(update={**changes, "files": hash_files(folder)}).write(folder)
        return exported(folder, records)

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        del exported
        tensors = tuple(planned(name, np.ones(shape, np.bool_)) for name, shape in source.linears.items())
        records = write(source, tensors, folder)
        progress(1, 1, FILE)
        return ExportedModel(folder, self.name, {FILE: (folder / FILE).stat().st_size}, records)

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        with np.load(folder / FILE) as stored:
            return {name.removesuffix(".weight"): stored[name] for name in stored if stored[name].ndim == 2}

    def card(self, recipe: ExportRecipe) -> FormatNotes:
        del recipe
        return FormatNotes("numpy", "NumPy opens `weights.npz`.", ("It is as large as the dense model.",))


def planned(name: str, mask: NDArray[np.bool_]) -> PlannedTensor:
    shape = (mask.shape[0], mask.shape[1])
    return PlannedTensor(name, shape, "dense", "f32", int(mask.sum()), 4 * mask.size, "plain arrays")


def write(source: Checkpoint, tensors: tuple[PlannedTensor, ...], folder: Path) -> tuple[TensorRecord, ...]:
    arrays = {name: np.asarray(source.array(name), np.float32) for name in source.files}
    np.savez(folder / FILE, allow_pickle=False, **arrays)
    copy_side_files(source.folder, folder)
    return tuple(record(tensor, arrays[f"{tensor.name}.weight"]) for tensor in tensors)


def record(tensor: PlannedTensor, array: NDArray[np.float32]) -> TensorRecord:
    return TensorRecord(
        name=tensor.name,
        shape=array.shape,
        layout="dense",
        value_type="f32",
        nnz=tensor.nnz,
        bytes=array.nbytes,
        bits_per_weight=32.0,
        sha256=hashlib.sha256(np.ascontiguousarray(array).data).hexdigest(),
        reason=tensor.reason,
    )


def exported(folder: Path, records: tuple[TensorRecord, ...]) -> ExportedModel:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return ExportedModel(folder, NpzExporter.name, files, records)


class NpzRuntime(Runtime):
    """Unpacks the file into a temporary Hugging Face folder for the reference runtime."""

    name = "npz"
    opens = f"a folder with {FILE}"

    def supports(self, folder: Path) -> bool:
        return (folder / FILE).is_file()

    def open(self, folder: Path, *, threads: int) -> Session:
        import torch

        from losa_deploy.runtimes.reference import ReferenceRuntime

        with tempfile.TemporaryDirectory() as place, np.load(folder / FILE) as stored:
            write_weights(Path(place), ((name, torch.from_numpy(stored[name])) for name in stored))
            copy_side_files(folder, Path(place))
            return ReferenceRuntime().open(Path(place), threads=threads)
