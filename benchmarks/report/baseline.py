"""The dense baseline: the unpruned model in the same format and graph as the artifact, dense f32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.card import mean_bits
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Exporter
from losa_deploy.manifest import MANIFEST_FILE, Manifest, hash_files
from losa_deploy.plugins import exporters, load_exporter
from losa_deploy.progress import Progress
from losa_deploy.seal import damage, seal
from losa_deploy.sources.checkpoint import Checkpoint

BITS = {"F32": 32.0, "F16": 16.0, "BF16": 16.0}


@dataclass(frozen=True)
class DenseBaseline:
    """What is known of the dense model: files in the artifact's format, or only those of the source."""

    bytes: int
    bits_per_weight: float
    """Of the block linears."""
    value_type: str
    folder: Path | None = None
    """None if it is not run."""
    reason: str = ""
    """Why it is not."""

    @classmethod
    def of_folder(cls, folder: Path) -> DenseBaseline:
        """What `dense_baseline` wrote."""
        manifest = Manifest.read(folder)
        kind = next((record.value_type for record in manifest.linears), "f32")
        return cls(folder_bytes(folder, manifest), mean_bits(manifest), kind, folder)

    @classmethod
    def of_source(cls, source: Checkpoint, reason: str) -> DenseBaseline:
        """The model as it came."""
        kind, _ = source.header(f"{next(iter(source.linears))}.weight")
        size = sum(path.stat().st_size for path in set(source.files.values()))
        return cls(size, BITS.get(kind, 32.0), kind.lower(), None, reason)


def baseline_name(format_name: str) -> str:
    """Of the folder in a work folder that `dense_baseline` writes for artifacts of a format."""
    return f"dense-{format_name}"


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
    Manifest(
        kind="dense",
        format=exporter.name,
        source=manifest.source,
        recipe=manifest.recipe,
        sparsity_achieved=0.0,
        linears=tuple(record for record in dense.tensors if record.name in source.linears),
        other_tensors=tuple(record for record in dense.tensors if record.name not in source.linears),
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


def folder_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes of the files of the manifest: the model without reports and card.

    Of two forms of the model in one folder only the one that is opened counts.
    """
    beside: tuple[str, ...] = ()
    if manifest.format in exporters():
        beside = load_exporter(manifest.format).files_beside(folder)
    return sum((folder / name).stat().st_size for name in manifest.files if name not in beside)
