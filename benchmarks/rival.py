"""The rival of a run: llama.cpp's own quantization of the dense model, which people would take otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.bindings.llama_cpp import load_package, version
from losa_deploy.errors import LosaError, MissingError
from losa_deploy.manifest import Manifest
from losa_deploy.output import require_disk
from losa_deploy.plugins import load_exporter
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.seal import damage, seal
from losa_deploy.sources.checkpoint import Checkpoint

from .gguf_sizes import block_sizes
from .synthetic.ggufs import quantize

RUNTIME = "llamacpp-stock"
STAMP = "rival.json"


@dataclass(frozen=True)
class RivalFile:
    """A quantized file of the dense model, or why there is none."""

    kind: str
    """llama.cpp's name in small letters, e.g. q4_0."""
    path: Path | None = None
    bits_per_weight: float = 0.0
    """Of the block linears, by their bytes in the file."""
    reason: str = ""
    runtime: str = RUNTIME
    """Where it is measured: llama.cpp without anything of ours."""

    @property
    def label(self) -> str:
        """As people write it, e.g. Q4_0."""
        return self.kind.upper()


def rival_file(
    source: Checkpoint | None,
    exported: Path,
    dense: Path | None,
    kind: str,
    work: Path,
    threads: int,
    warn: Callable[[str], None],
    progress: Progress = no_progress,
) -> RivalFile:
    """`work/rival-<kind>/<kind>.gguf`, reused if it is intact and of the same source.

    It is made of the GGUF file in the folder `dense`, or of `source` if there is none. The manifest of the
    artifact `exported` says where the source came from. What stands in the way is a reason, never an error: a
    run does not fail because its rival cannot be had.
    """
    if kind == "none":
        return RivalFile(kind, reason="switched off with --rival none")
    if source is None:
        return RivalFile(kind, reason="the dense model is not at hand")
    if not version():
        return RivalFile(kind, reason="llama-cpp-python is not installed")
    try:
        load_package()
        found = sorted(dense.glob("*.gguf")) if dense else []
        path = _file(source, exported, found[0] if found else None, kind, work, threads, warn, progress)
        return RivalFile(kind, path, block_sizes(path).bits_per_weight)
    except LosaError as error:
        message = error.message if not isinstance(error, MissingError) else str(error)
        return RivalFile(kind, reason=message.rstrip("."))


def _file(
    source: Checkpoint,
    exported: Path,
    dense_gguf: Path | None,
    kind: str,
    work: Path,
    threads: int,
    warn: Callable[[str], None],
    progress: Progress,
) -> Path:
    """The file, made again where it is damaged or of another model."""
    folder = work / f"rival-{kind}"
    path = folder / f"{kind}.gguf"
    record = Manifest.read(exported).source
    made_from = {"source": record.model_dump(mode="json"), "llama-cpp-python": version()}
    stamp = json.dumps(made_from, indent=1) + "\n"
    if record.files and _stamped(folder, stamp):
        found = damage(folder)
        if not found:
            return path
        warn(f"{found}: quantizing the dense model again.")
    partial = folder.with_name(folder.name + ".partial")
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dense = dense_gguf or write_dense(source, exported, partial / "dense", progress)
        quantize(dense, kind, threads, partial / path.name)
        shutil.rmtree(partial / "dense", ignore_errors=True)
        (partial / STAMP).write_text(stamp, "utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seal(folder)
    return path


def _stamped(folder: Path, stamp: str) -> bool:
    try:
        return (folder / STAMP).read_text("utf-8") == stamp
    except (OSError, UnicodeDecodeError):
        return False


def write_dense(source: Checkpoint, exported: Path, folder: Path, progress: Progress = no_progress) -> Path:
    """`source` as a dense GGUF in the new folder `folder`: F16, or F32 if the artifact's weights are f32.

    Raises `InputError` for a model that llama.cpp does not run, `ResourceError` if the disk is too small.
    """
    exporter = load_exporter("gguf")
    exporter.check_source(source, ExportRecipe())
    require_disk(
        folder.parent, sum(path.stat().st_size for path in set(source.files.values())), "A dense GGUF"
    )
    folder.mkdir()
    exporter.export_dense(source, exported, folder, progress)
    return next(folder.glob("*.gguf"))
