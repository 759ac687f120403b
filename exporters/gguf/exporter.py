"""The GGUF exporter: a merged sparse model → files that llama.cpp opens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.card import FormatNotes
from losa_deploy.errors import UsageError
from losa_deploy.gguf.dense import VALUE_TYPES, dense_gguf_bytes, dense_type, is_narrower, scale_group
from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import (
    ExportedModel,
    Exporter,
    ExportPlan,
    MaskOf,
    PlannedTensor,
    SecondForm,
    Shapes,
    StoredFile,
)
from losa_deploy.manifest import Manifest, TensorRecord
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe, ValueType
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from . import reader
from .architectures import architecture
from .describe import SUFFIX, describe
from .plan import DENSE_REASON, Job, Kind, estimate, plan
from .tokenizer import check_tokenizer, read_vocabulary
from .vocabulary import Vocabulary
from .writer import Provenance, write_file

PORTABLE_NOTE = (
    "{file} is portable: dense with exact zeros, so it is not smaller than an unpruned model of the same "
    "type. --packed writes a file without the zeros."
)
PACKED_NEEDS = (
    "The file with `LOSA` in its name is packed: it holds no zeros, and llama.cpp opens it through the "
    'backend of losa-deploy (`pip install "losa-deploy[llamacpp]"`); stock tools refuse it.'
)
PORTABLE_NEEDS = (
    "{} is portable: every tool for GGUF opens it. It keeps its zeros, so it is not smaller than "
    "an unpruned model of the same type."
)


class GgufExporter(Exporter):
    """`--format gguf`."""

    name = "gguf"
    runtime = "llamacpp"
    suffixes = (SUFFIX,)

    def estimate(
        self, linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
    ) -> Mapping[str, tuple[PlannedTensor, ...]]:
        """One file or two."""
        return estimate(linears, others, recipe, mask, _kinds(recipe))

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

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """Layouts from the masks, sizes from headers; raises also if a masked linear is unknown."""
        self.check_source(model.checkpoint, recipe)
        model.check_masks()
        return plan(_jobs(model, recipe))

    def export(self, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress) -> ExportedModel:
        """Write one or two GGUF files, the side files and `losa.json` into `folder`."""
        vocabulary = _vocabulary(model.checkpoint)
        manifest, recipe = model.manifest, plan.recipe
        provenance = _provenance(manifest, recipe.value_type, manifest.sparsity_achieved)
        jobs = _jobs(model, recipe)
        records = []
        for index, job in enumerate(jobs):
            # The second file is portable, where the recipe decides all.
            tensors = job.planned() if index else plan.tensors
            step = partial(_shifted, progress, index, len(jobs))
            records.append(write_file(job, tensors, vocabulary, provenance, folder, step))
        copy_side_files(model.folder, folder)
        parts = _split(model.checkpoint, records[0])
        manifest.exported(self.name, recipe, *parts, folder).write(folder)
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
        records = write_file(job, job.planned(), _vocabulary(source), provenance, folder, progress)
        copy_side_files(source.folder, folder)
        return _exported(folder, records, ())

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        """Linear, embedding, head → weight [out, in], from the packed file if there is one."""
        return _decode(find_gguf(folder), folder)

    def decode_beside(self, folder: Path) -> SecondForm | None:
        """The portable file beside a packed one; embedding and head are the same in both."""
        portable = self.files_beside(folder)
        if not portable:
            return None
        manifest = Manifest.read(folder)
        value_type = manifest.recipe.export.value_type
        linears = tuple(_portable(record, value_type) for record in manifest.linears)
        return SecondForm(linears, _decode(folder / portable[0], folder))

    def files_beside(self, folder: Path) -> tuple[str, ...]:
        """Name of the portable file beside a packed one."""
        primary = find_gguf(folder)
        return tuple(path.name for path in sorted(folder.glob(f"*{SUFFIX}")) if path != primary)

    def dense_bytes(self, shape: tuple[int, int], value_type: ValueType, group_size: int) -> int:
        """Of a tensor of llama.cpp's own type, or of one of ours that has none as small."""
        if is_narrower(value_type):
            return super().dense_bytes(shape, value_type, group_size)
        return dense_gguf_bytes(value_type, shape)

    def describe(self, file: Path) -> StoredFile | None:
        """Keys and tensors of any GGUF file."""
        return describe(file)

    def card(self, recipe: ExportRecipe) -> FormatNotes:
        """Which of the two kinds of file is there, and what opens it."""
        needs = PACKED_NEEDS if recipe.packed else PORTABLE_NEEDS.format("The `.gguf` file")
        if recipe.packed and recipe.portable:
            needs += " " + PORTABLE_NEEDS.format("The other one")
        return FormatNotes(library="gguf", needs=needs)


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


def _shifted(progress: Progress, index: int, files: int, done: int, total: int, label: str) -> None:
    """The progress of one file as a part of that of all files, which have as many tensors."""
    progress(index * total + done, files * total, label)


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
    return ExportedModel(folder, "gguf", files, records, notes)
