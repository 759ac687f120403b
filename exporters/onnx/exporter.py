"""The ONNX exporter: a merged sparse model → a folder that every ONNX host opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from losa_deploy import __version__
from losa_deploy.bindings.libraries import library_name, library_path
from losa_deploy.errors import InputError, UsageError
from losa_deploy.interfaces import ExportedModel, ExportPlan, SecondForm
from losa_deploy.layouts import PATTERNED
from losa_deploy.layouts.operator_names import DOMAIN
from losa_deploy.manifest import SCHEMA, Manifest, hash_files
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from . import reader
from .attention import rope_kind
from .functions import VERSION
from .graph import LOG_FILE, MODEL_FILE, DenseGraph, dense_graph
from .pack import Packing, pack_graph
from .plan import Job, choice, plan
from .restore import restored_graph
from .writer import DATA_FILE, Writer

GENAI_FILE = "genai_config.json"


class OnnxExporter:
    """`--format onnx`."""

    name = "onnx"
    building_bytes = 12.0
    judge = "ort-stock"

    def parts(self, recipe: ExportRecipe) -> Mapping[str, bool]:
        """The data file; the graph is small."""
        return {DATA_FILE: recipe.portable}

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        """Raise before any work if no graph can be right, or the recipe asks for what only GGUF has."""
        if recipe.packed:
            raise UsageError(
                "--packed is for --format gguf; an ONNX artifact is always packed where that saves bytes.",
                hint="Leave --packed out (or add --no-packed).",
            )
        rope_kind(source)

    def check(self, model: SparseModel, recipe: ExportRecipe) -> None:
        """Raise before any work if a forced layout does not fit a mask, or a masked linear is unknown."""
        self.check_source(model.checkpoint, recipe)
        unknown = sorted(model.masked - set(model.linears))
        if unknown:
            raise InputError(
                f"masks.safetensors has a mask for {unknown[0]}, which is no block linear of this model.",
                hint="Merge the model again.",
            )
        if recipe.layout in PATTERNED:
            job = _job(model, recipe)
            for linear in model.linears:
                choice(job, linear, model.mask(linear))

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """What `export` would write, from headers and masks only."""
        return plan(_job(model, recipe))

    def export(
        self, model: SparseModel, recipe: ExportRecipe, folder: Path, progress: Progress
    ) -> ExportedModel:
        """Write the artifact and its `losa.json` into `folder`."""
        self.check(model, recipe)
        source = model.manifest.source
        properties = {"losa.source": source.id, "losa.revision": source.revision}
        packing = _write(_job(model, recipe), folder, properties, progress)
        effective = model.manifest.recipe.model_copy(update={"export": recipe})
        manifest = model.manifest.model_copy(
            update={
                "kind": "exported",
                "format": self.name,
                "recipe": effective,
                "linears": tuple(packing.linears),
                "other_tensors": tuple(packing.others),
                "files": hash_files(folder),
            }
        )
        manifest.write(folder)
        return _exported(folder, packing)

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        """The unpruned f32 model, in the graph of the artifact `exported` and without operators of ours."""
        recipe = ExportRecipe(layout="dense", value_type="f32", head="f32")
        linears = source.linears
        job = Job(source, recipe, lambda linear: np.ones(linears[linear], np.bool_))
        graph = restored_graph(exported, source)
        return _exported(folder, write_graph(job, graph, folder, {}, progress))

    def decode_beside(self, folder: Path) -> SecondForm | None:
        """None: a folder holds one model."""
        del folder
        return None

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


def _job(model: SparseModel, recipe: ExportRecipe) -> Job:
    return Job(model.checkpoint, recipe, model.mask, model.grid)


def _write(job: Job, folder: Path, properties: Mapping[str, str], progress: Progress) -> Packing:
    """Graph, data and side files."""
    total = len(job.checkpoint.linears) + 1
    progress(0, total, "building the graph")
    with dense_graph(job.checkpoint, folder, plain=job.recipe.portable) as graph:
        return write_graph(job, graph, folder, properties, progress)


def write_graph(
    job: Job, graph: DenseGraph, folder: Path, properties: Mapping[str, str], progress: Progress
) -> Packing:
    """Everything but `losa.json`, from a dense graph of the job's checkpoint, which is used up."""
    config = json.loads((graph.folder / GENAI_FILE).read_text("utf-8"))
    packing = pack_graph(job, graph, Writer(folder), progress)
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
    records = tuple(record.model_dump(mode="json") for record in (*packing.linears, *packing.others))
    return ExportedModel(folder, "onnx", files, records)
