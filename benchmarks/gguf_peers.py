"""Peers that are GGUF files: llama.cpp's quantizations of a real model, and our own dense i4 and i3."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from losa_deploy.gguf.view import find_gguf
from losa_deploy.manifest import Manifest, SourceRecord
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask
from losa_deploy.output import remove
from losa_deploy.planned import export_planned
from losa_deploy.plugins import load_exporter
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import CalibrationRecipe, ExportRecipe, Recipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from .imatrix import REQUIRED, importance_file
from .peer_kinds import Material, Source
from .rival import write_dense
from .synthetic import ggufs
from .synthetic.peers import OURS_DENSE, Contender

FORMAT = "gguf"
CALIBRATION = CalibrationRecipe(samples=32, sequence_length=256)
"""What importances are taken from: the text that the preset `quick` prunes with, written by the model."""


def real_peers() -> tuple[str, ...]:
    """Names of the peers that are GGUF files, made with nothing but what is installed with us."""
    return (*ggufs.PEERS, *ggufs.WITH_IMPORTANCE, *OURS_DENSE)


def make_peer(
    name: str,
    dense: Path,
    source: Source,
    folder: Path,
    threads: int,
    progress: Progress = no_progress,
    *,
    imatrix: bool = False,
    shared: Path | None = None,
) -> Path:
    """The GGUF file of a peer in `folder`, made of the file `dense`, or what is there already.

    `source` opens the same model as a Hugging Face folder, which only some peers need. Importances are kept
    in the folder `shared` for other peers, or in `folder`.
    """
    if name == ggufs.SOURCE:
        return dense
    weighted = imatrix or name in REQUIRED
    target = folder / f"{dense.stem}-{name}{'-imatrix' if imatrix and name not in REQUIRED else ''}.gguf"
    if target.is_file():
        return target
    unfinished = target.with_suffix(".partial")
    if name in OURS_DENSE:
        _write_ours(source(), name, unfinished, folder, progress)
    else:
        weights = _importance(source(), dense, shared or folder, progress) if weighted else None
        progress(0, 1, f"quantizing to {name}")
        ggufs.quantize(dense, name, threads, unfinished, weights)
    unfinished.rename(target)
    return target


def _importance(source: Checkpoint, dense: Path, folder: Path, progress: Progress) -> Path:
    context = source.config.get("max_position_embeddings")
    longest = context if isinstance(context, int) and context >= 8 else CALIBRATION.sequence_length
    length = min(CALIBRATION.sequence_length, longest)
    calibration = CALIBRATION.model_copy(update={"sequence_length": length})
    return importance_file(source, dense, calibration, folder, progress=progress)


def _write_ours(source: Checkpoint, name: str, target: Path, folder: Path, progress: Progress) -> None:
    """The unpruned model as a packed file of the dense values of `OURS_DENSE[name]`, a scale per 128."""
    place = folder / f"{target.stem}.parts"
    remove(place)
    try:
        model = whole_model(source, place / "model")
        value_type = OURS_DENSE[name].value_type
        recipe = ExportRecipe.model_validate({"layout": "dense", "value_type": value_type, "packed": True})
        exporter = load_exporter(FORMAT)
        plan = exporter.plan(model, recipe)
        out = place / "out"
        out.mkdir()
        export_planned(exporter, model, plan, out, progress)
        find_gguf(out).rename(target)
    finally:
        remove(place)


def whole_model(source: Checkpoint, folder: Path) -> SparseModel:
    """`source` as a merged model of which nothing was pruned; the weights are links to its files."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    copy_side_files(source.folder, folder)
    for path in source.folder.glob("*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    masks = {name: pack_mask(np.ones(shape, np.bool_)) for name, shape in source.linears.items()}
    save_file(masks, folder / MASK_FILE)
    record = SourceRecord(id=source.folder.resolve().name)
    Manifest(kind="merged", source=record, recipe=Recipe(), sparsity_achieved=0.0, linears=()).write(folder)
    return SparseModel.open(folder)


def dense_gguf(source: Checkpoint, record: SourceRecord, folder: Path) -> Path:
    """`source` as a dense F16 file in `folder`, or what an earlier call wrote for the same model."""
    digest = hashlib.sha256(json.dumps(sorted(record.files.items())).encode()).hexdigest()[:16]
    place, partial = folder / f"dense-{digest}", folder / f"dense-{digest}.partial"
    if not place.is_dir():
        remove(partial)
        partial.mkdir(parents=True)
        try:
            about = partial / "about"
            about.mkdir()
            Manifest(kind="dense", source=record, recipe=Recipe(), sparsity_achieved=0.0, linears=()).write(
                about
            )
            write_dense(source, about, partial / "file")
            (partial / "file").rename(place)
        finally:
            remove(partial)
    return next(place.glob("*.gguf"))


class GgufPeers:
    """Quantizations by llama.cpp, and our own dense files."""

    names = real_peers()

    def make(self, name: str, material: Material) -> Contender:
        """The file of the peer, in llama.cpp as it is, or with our backend."""
        m = material
        target = make_peer(name, m.dense, m.source, m.folder, m.threads, m.progress)
        runtime = m.ours if name in OURS_DENSE else m.ours.baseline()
        return Contender(name, target, target.stat().st_size, runtime)
