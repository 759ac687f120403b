"""The dense baseline: the unpruned model in the same format and graph as the artifact, dense f32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Exporter, Progress
from losa_deploy.manifest import MANIFEST_FILE, Manifest, TensorRecord, hash_files
from losa_deploy.seal import damage, seal


def dense_baseline(
    source: Checkpoint,
    exported: Path,
    exporter: Exporter,
    folder: Path,
    progress: Progress,
    warn: Callable[[str], None],
) -> Path:
    """Write `source` dense into `folder`, or reuse what is there if it is intact and of the same source.

    The manifest of the artifact `exported` says where the source came from; `warn` hears of damage.
    """
    manifest = Manifest.read(exported)
    if _is_current(folder, manifest):
        found = damage(folder)
        if not found:
            return folder
        warn(f"{found}: writing the dense baseline again.")
    partial = folder.with_name(folder.name + ".partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    dense = exporter.export_dense(source, exported, partial, progress)
    records = [TensorRecord.model_validate(record) for record in dense.tensors]
    Manifest(
        kind="dense",
        format=exporter.name,
        source=manifest.source,
        recipe=manifest.recipe,
        sparsity_achieved=0.0,
        linears=tuple(record for record in records if record.name in source.linears),
        other_tensors=tuple(record for record in records if record.name not in source.linears),
        files=hash_files(partial),
    ).write(partial)
    partial.rename(folder)
    seal(folder)
    return folder


def _is_current(folder: Path, manifest: Manifest) -> bool:
    if not (folder / MANIFEST_FILE).is_file() or not manifest.source.files:
        return False
    try:
        found = Manifest.read(folder)
    except InputError:
        return False
    return found.source == manifest.source and found.tool_version == manifest.tool_version
