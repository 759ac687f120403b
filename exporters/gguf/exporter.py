"""The GGUF exporter: a merged sparse model → files that llama.cpp opens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, UsageError
from losa_deploy.gguf.dense import VALUE_TYPES, dense_gguf_bytes, dense_type, scale_group
from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import ExportedModel, ExportPlan, SecondForm
from losa_deploy.layouts import PATTERNED
from losa_deploy.manifest import Manifest, TensorRecord, hash_files
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from . import reader
from .architectures import architecture
from .plan import DENSE_REASON, Job, Kind, packing, plan
from .tokenizer import check_tokenizer, read_vocabulary
from .vocabulary import Vocabulary
from .writer import Provenance, write_file

PORTABLE_NOTE = (
    "{file} is portable: dense with exact zeros, so it is not smaller than an unpruned model of the same "
    "type. --packed writes a file without the zeros."
)


class GgufExporter:
    """`--format gguf`."""

    name = "gguf"
    building_bytes = 0.0
    judge = "llamacpp-f32"

    def parts(self, recipe: ExportRecipe) -> Mapping[str, bool]:
        """One file or two."""
        return {f"{kind} .gguf": kind == "portable" for kind in _kinds(recipe)}

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        """Raise before any work if llama.cpp cannot run this model, or GGUF cannot hold what is asked for."""
        architecture(source)
        check_tokenizer(source.folder)
        if recipe.bundle_runtime:
            raise UsageError(
                "--bundle-runtime is for --format onnx; llama.cpp finds our backend by its path.",
                hint="Leave --bundle-runtime out (or add --no-bundle-runtime).",
            )
        if recipe.layout not in ("auto", "dense") and not recipe.packed:
            raise UsageError(
                f"--layout {recipe.layout} needs --packed: a portable GGUF holds dense tensors.",
                hint="Add --packed, or use --layout auto.",
            )

    def check(self, model: SparseModel, recipe: ExportRecipe) -> None:
        """Raise also if a forced layout does not fit a mask, or a masked linear is unknown."""
        self.check_source(model.checkpoint, recipe)
        unknown = sorted(model.masked - set(model.linears))
        if unknown:
            raise InputError(
                f"masks.safetensors has a mask for {unknown[0]}, which is no block linear of this model.",
                hint="Merge the model again.",
            )
        if recipe.layout in PATTERNED:
            for linear in model.linears:
                packing(recipe, linear, model.mask(linear))

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """What `export` would write, from headers and masks only."""
        return plan(_jobs(model, recipe))

    def export(
        self, model: SparseModel, recipe: ExportRecipe, folder: Path, progress: Progress
    ) -> ExportedModel:
        """Write one or two GGUF files, the side files and `losa.json` into `folder`."""
        self.check(model, recipe)
        vocabulary = _vocabulary(model.checkpoint)
        manifest = model.manifest
        provenance = _provenance(manifest, recipe.value_type, manifest.sparsity_achieved)
        jobs = _jobs(model, recipe)
        total = sum(len(job.entries) for job in jobs)
        records = []
        for index, job in enumerate(jobs):
            start = sum(len(earlier.entries) for earlier in jobs[:index])
            step = partial(_shifted, progress, start, total)
            records.append(write_file(job, vocabulary, provenance, folder, step))
        copy_side_files(model.folder, folder)
        linears, others = _split(model.checkpoint, records[0])
        changes = {
            "kind": "exported",
            "format": self.name,
            "recipe": manifest.recipe.model_copy(update={"export": recipe}),
            "linears": linears,
            "other_tensors": others,
            "files": hash_files(folder),
        }
        manifest.model_copy(update=changes).write(folder)
        notes = list(vocabulary.notes)
        notes += [PORTABLE_NOTE.format(file=job.file) for job in jobs if job.kind == "portable"]
        return _exported(folder, records[0], tuple(note for note in notes if note))

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        """The unpruned model as F16, or as F32 if the weights of the artifact `exported` are f32."""
        manifest = Manifest.read(exported)
        value_type = "f32" if manifest.recipe.export.value_type == "f32" else "f16"
        recipe = ExportRecipe.model_validate({"layout": "dense", "value_type": value_type})
        job = Job(source, recipe, lambda linear: _ones(source, linear), "portable", manifest.source.id)
        provenance = _provenance(manifest, value_type, 0.0)
        records = write_file(job, _vocabulary(source), provenance, folder, progress)
        copy_side_files(source.folder, folder)
        return _exported(folder, records, ())

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        """Linear, embedding, head → weight [out, in], from the packed file if there is one."""
        return _decode(find_gguf(folder), folder)

    def decode_beside(self, folder: Path) -> SecondForm | None:
        """The portable file beside a packed one; embedding and head are the same in both."""
        primary = find_gguf(folder)
        portable = [path for path in folder.glob("*.gguf") if path != primary]
        if not portable:
            return None
        manifest = Manifest.read(folder)
        value_type = manifest.recipe.export.value_type
        linears = tuple(_portable(record, value_type) for record in manifest.linears)
        return SecondForm(linears, _decode(portable[0], folder))


def _decode(path: Path, folder: Path) -> Mapping[str, NDArray[np.float32]]:
    manifest = Manifest.read(folder)
    return reader.decode(path, folder, (*manifest.linears, *manifest.other_tensors))


def _portable(record: TensorRecord, value_type: str) -> TensorRecord:
    """How a portable file stores a linear, by the rules of the format and not by what a file says."""
    rows, columns = record.shape
    kind = dense_type(value_type, columns)
    size = dense_gguf_bytes(value_type, (rows, columns))
    changes = {
        "layout": "dense",
        "value_type": VALUE_TYPES[kind],
        "group_size": scale_group(kind),
        "bytes": size,
        "bits_per_weight": 8.0 * size / (rows * columns),
        "sha256": "",
        "reason": DENSE_REASON,
    }
    return record.model_copy(update=changes)


def _shifted(progress: Progress, start: int, total: int, done: int, _: int, label: str) -> None:
    """The progress of one file as a part of that of all files."""
    progress(start + done, total, label)


def _jobs(model: SparseModel, recipe: ExportRecipe) -> tuple[Job, ...]:
    """The files to write, the primary one first."""
    source = model.manifest.source.id
    return tuple(
        Job(model.checkpoint, recipe, model.mask, kind, source, model.grid) for kind in _kinds(recipe)
    )


def _kinds(recipe: ExportRecipe) -> tuple[Kind, ...]:
    portable: tuple[Kind, ...] = ("portable",) if recipe.portable or not recipe.packed else ()
    return ("packed", *portable) if recipe.packed else portable


def _ones(source: Checkpoint, linear: str) -> NDArray[np.bool_]:
    return np.ones(source.linears[linear], np.bool_)


def _vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    rows = checkpoint.shape(f"{checkpoint.family.embedding}.weight")[0]
    return read_vocabulary(checkpoint.folder, rows, checkpoint.config)


def _provenance(manifest: Manifest, value_type: str, sparsity: float) -> Provenance:
    source = manifest.source
    return {
        "license": source.license,
        "source": source.id,
        "revision": source.revision,
        "sparsity": sparsity,
        "value_type": value_type,
    }


def _split(
    checkpoint: Checkpoint, records: tuple[TensorRecord, ...]
) -> tuple[tuple[TensorRecord, ...], tuple[TensorRecord, ...]]:
    """Records of linears, and of embedding and head."""
    count = len(checkpoint.linears)
    return records[:count], records[count:]


def _exported(folder: Path, records: tuple[TensorRecord, ...], notes: tuple[str, ...]) -> ExportedModel:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    tensors = tuple(record.model_dump(mode="json") for record in records)
    return ExportedModel(folder, "gguf", files, tensors, notes)
