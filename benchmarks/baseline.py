"""The dense baseline: the unpruned model in the same format and from the same graph source, dense f32."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from losa_deploy.checkpoint import Checkpoint, copy_side_files
from losa_deploy.interfaces import Exporter, Progress
from losa_deploy.manifest import MANIFEST_FILE, Manifest, TensorRecord
from losa_deploy.model import MASK_FILE, SparseModel
from losa_deploy.recipe import ExportRecipe

DENSE = ExportRecipe(layout="dense", value_type="f32", head="f32")


def dense_baseline(
    source: Checkpoint, manifest: Manifest, exporter: Exporter, folder: Path, progress: Progress
) -> Path:
    """Export `source` dense into `folder`, or reuse what is there if it is of the same source files.

    `manifest` (of the merged model) says where the source came from.
    """
    if _is_current(folder, manifest):
        return folder
    partial = folder.with_name(folder.name + ".partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    unpruned = folder.with_name(folder.name + ".source")
    try:
        exporter.export(unpruned_model(source, manifest, unpruned), DENSE, partial, progress)
    finally:
        shutil.rmtree(unpruned, ignore_errors=True)
    partial.rename(folder)
    return folder


def unpruned_model(source: Checkpoint, manifest: Manifest, folder: Path) -> SparseModel:
    """`source` as a model without masks; its weight files are linked (or copied) into `folder`."""
    from safetensors.numpy import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_side_files(source.folder, folder)
    names = {path.name for path in source.files.values()} | {"model.safetensors.index.json"}
    for name in sorted(names):
        if (source.folder / name).is_file():
            _link(source.folder / name, folder / name)
    save_file({}, folder / MASK_FILE)
    records = tuple(_dense_record(name, shape) for name, shape in source.linears.items())
    recipe = manifest.recipe.model_copy(update={"export": DENSE})
    Manifest(
        kind="merged", source=manifest.source, recipe=recipe, sparsity_achieved=0.0, linears=records
    ).write(folder)
    return SparseModel.open(folder)


def _dense_record(name: str, shape: tuple[int, int]) -> TensorRecord:
    positions = shape[0] * shape[1]
    return TensorRecord(
        name=name,
        shape=shape,
        layout="dense",
        value_type="f32",
        nnz=positions,
        bytes=4 * positions,
        bits_per_weight=32.0,
        sha256="",
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.resolve(), target)
    except OSError:  # no symbolic links here (Windows without the right)
        shutil.copyfile(source, target)


def _is_current(folder: Path, manifest: Manifest) -> bool:
    if not (folder / MANIFEST_FILE).is_file() or not manifest.source.files:
        return False
    found = Manifest.read(folder)
    return found.source == manifest.source and found.tool_version == manifest.tool_version
