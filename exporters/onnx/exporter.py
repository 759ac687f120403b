"""The ONNX exporter: a merged sparse model → a folder that every ONNX host opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from losa_deploy import __version__
from losa_deploy.bindings.libraries import library_name, library_path
from losa_deploy.card import FormatNotes
from losa_deploy.errors import InputError, UsageError
from losa_deploy.interfaces import ExportedModel, Exporter, ExportPlan, MaskOf, PlannedTensor, Shapes
from losa_deploy.layouts.operator_names import DOMAIN
from losa_deploy.manifest import SCHEMA, Manifest
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from . import reader
from .attention import rope_kind
from .functions import VERSION
from .graph import LOG_FILE, MODEL_FILE, DenseGraph, dense_graph
from .pack import Packing, pack_graph
from .plan import Job, estimate, plan, planned
from .restore import restored_graph
from .writer import Writer

GENAI_FILE = "genai_config.json"
STOCK_LIMIT = (
    "ONNX Runtime without the operators of losa-deploy opens this folder too, but expands packed weights "
    "when it loads them: memory and speed are then those of dense f32."
)


class OnnxExporter(Exporter):
    """`--format onnx`."""

    name = "onnx"
    runtime = "ort"
    suffixes = (".onnx", ".data")

    def estimate(
        self, linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
    ) -> Mapping[str, tuple[PlannedTensor, ...]]:
        """The data file; the graph is small."""
        return estimate(linears, others, recipe, mask)

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        """Raise before any work if no graph can be right, or the recipe asks for what only GGUF has."""
        if recipe.packed:
            raise UsageError(
                "--packed is for --format gguf; an ONNX artifact is always packed where that saves bytes.",
                hint="Leave --packed out (or add --no-packed).",
            )
        rope_kind(source)

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """Layouts from the masks, sizes from headers; raises also if a masked linear is unknown."""
        self.check_source(model.checkpoint, recipe)
        model.check_masks()
        return plan(_job(model, recipe))

    def export(self, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress) -> ExportedModel:
        """Write the artifact and its `losa.json` into `folder`."""
        source = model.manifest.source
        properties = {"losa.source": source.id, "losa.revision": source.revision}
        packing = _write(_job(model, plan.recipe), plan.tensors, folder, properties, progress)
        records = (packing.linears, packing.others)
        model.manifest.exported(self.name, plan.recipe, *records, folder).write(folder)
        return _exported(folder, packing)

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        """The unpruned f32 model, in the graph of the artifact `exported` and without operators of ours."""
        recipe = ExportRecipe(layout="dense", value_type="f32", head="f32")
        linears = source.linears
        job = Job(source, recipe, lambda linear: np.ones(linears[linear], np.bool_))
        graph = restored_graph(exported, source)
        return _exported(folder, write_graph(job, planned(job), graph, folder, {}, progress))

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        """Linear, embedding, head → weight [out, in], unpacked from the bytes of the artifact.

        An f32 embedding or head is left out: it is the source's own.
        """
        manifest = Manifest.read(folder)
        linears = [record.name for record in manifest.linears]
        weights = reader.decode(folder)
        missing = [name for name in linears if name not in weights]
        if missing:
            raise InputError(
                f"{folder / MODEL_FILE} does not hold {missing[0]}.", hint="Export the model again."
            )
        group_size = manifest.recipe.export.group_size
        tables = reader.decode_tables(folder, manifest.other_tensors, group_size)
        return weights.only(linears).joined(tables)

    def card(self, recipe: ExportRecipe) -> FormatNotes:
        """What opens the folder, and what it is without our operators."""
        del recipe
        return FormatNotes(
            library="onnx",
            needs=f"Any ONNX Runtime from 1.24 on opens `{MODEL_FILE}`: its packed weights come with their "
            "own decoder in standard operators, and no library of ours is needed.",
            limits=(STOCK_LIMIT,),
        )


def _job(model: SparseModel, recipe: ExportRecipe) -> Job:
    return Job(model.checkpoint, recipe, model.mask, model.grid)


def _write(
    job: Job,
    tensors: Iterable[PlannedTensor],
    folder: Path,
    properties: Mapping[str, str],
    progress: Progress,
) -> Packing:
    """Graph, data and side files."""
    total = len(job.checkpoint.linears) + 1
    progress(0, total, "building the graph")
    with dense_graph(job.checkpoint, folder, plain=job.recipe.portable) as graph:
        return write_graph(job, tensors, graph, folder, properties, progress)


def write_graph(
    job: Job,
    tensors: Iterable[PlannedTensor],
    graph: DenseGraph,
    folder: Path,
    properties: Mapping[str, str],
    progress: Progress,
) -> Packing:
    """Everything but `losa.json`: planned `tensors` in a dense graph of the checkpoint, which is used up."""
    config = json.loads((graph.folder / GENAI_FILE).read_text("utf-8"))
    packing = pack_graph(job, tensors, graph, Writer(folder), progress)
    _save(packing, folder, properties)
    copy_side_files(job.checkpoint.folder, folder)
    config["model"]["decoder"]["session_options"].pop("custom_ops_library", None)
    if job.recipe.bundle_runtime:
        shutil.copyfile(library_path(), folder / library_name())
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = library_name()
    (folder / GENAI_FILE).write_text(json.dumps(config, indent=4) + "\n", "utf-8")
    return packing


def _save(packing: Packing, folder: Path, properties: Mapping[str, str]) -> None:
    """Write `model.onnx`: nodes in order, our initializers, functions, opsets and properties."""
    model = packing.graph.model
    del model.graph.initializer[:]
    model.graph.initializer.extend(packing.writer.initializers)
    model.graph.name = "losa"
    used = {node.domain for node in model.graph.node} | {""}
    versions = {i.domain: i.version for i in model.opset_import} | {DOMAIN: VERSION}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, versions[domain]) for domain in sorted(used))
    del model.functions[:]
    model.functions.extend(packing.functions())
    model.producer_name, model.producer_version = "losa-deploy", __version__
    del model.metadata_props[:]
    helper.set_model_props(model, {"losa.schema": SCHEMA, **{k: v for k, v in properties.items() if v}})
    (folder / MODEL_FILE).write_bytes(model.SerializeToString(deterministic=True))


def _exported(folder: Path, packing: Packing) -> ExportedModel:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != LOG_FILE}
    return ExportedModel(folder, "onnx", files, (*packing.linears, *packing.others))
