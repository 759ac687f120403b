"""What a real model is compared with: llama.cpp's quantizations of it, and our own dense i4 and i3."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from losa_deploy.errors import InputError, LosaError, ResourceError
from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import Runtime
from losa_deploy.manifest import Manifest, SourceRecord
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask
from losa_deploy.output import remove
from losa_deploy.planned import export_planned
from losa_deploy.plugins import load_exporter, load_runtime
from losa_deploy.progress import Progress, no_progress
from losa_deploy.recipe import CalibrationRecipe, ExportRecipe, Recipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files

from .ik import package as ik_package
from .ik.runtime import IkRuntime
from .imatrix import REQUIRED, importance_file
from .report.baseline import baseline_name
from .rival import write_dense
from .synthetic import ggufs
from .synthetic.peers import LLAMACPP, OURS_DENSE, Contender

FORMAT = "gguf"
CALIBRATION = CalibrationRecipe(samples=32, sequence_length=256)
"""What importances are taken from: the text that the preset `quick` prunes with, written by the model."""
Source = Callable[[], Checkpoint]


def real_peers() -> tuple[str, ...]:
    """Names of the peers of a real model that need nothing but what is installed with us."""
    return (*ggufs.PEERS, *ggufs.WITH_IMPORTANCE, *OURS_DENSE)


def all_real_peers() -> tuple[str, ...]:
    """Those of ik_llama.cpp too."""
    return (*real_peers(), *ik_package.PEERS)


def peer_runtime(artifacts: Sequence[Path]) -> Runtime:
    """Where these artifacts meet their peers; raises `InputError` for one that it cannot open."""
    runtime = load_runtime(LLAMACPP)
    for path in artifacts:
        if not runtime.supports(path):
            raise InputError(
                f"{path} holds no GGUF file, and --peers quantizes GGUF files.",
                hint="Leave --peers out, or export with --format gguf.",
            )
    return runtime


def dense_file(work: Path, baseline: Path | None) -> Path:
    """The dense file that peers are made of: in `baseline`, or in the work folder of an artifact."""
    folder = baseline or work / baseline_name(FORMAT)
    found = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(
            f"There is no dense GGUF in {folder}, of which the peers could be made.",
            hint="Give one with --baseline, e.g. an F16 conversion of the unpruned model.",
        )
    return found[0]


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


def real_contenders(
    ours: Runtime,
    artifacts: Sequence[Path],
    dense: Path,
    peers: Sequence[str],
    source: Source,
    folder: Path,
    threads: int,
    progress: Progress = no_progress,
    *,
    ik: IkRuntime | None = None,
) -> tuple[list[Contender], dict[str, str]]:
    """Artifacts in `peer_runtime`, and `peers` of the file `dense`, llama.cpp's own without us.

    Peers of ik_llama.cpp run in `ik`. The second result is peer → reason, of those that their quantizer
    cannot make of this model. Raises `ResourceError` if there is no room for one.
    """
    stock = ours.baseline()
    contenders = [Contender(str(path), path, _gguf_bytes(path), ours, own=True) for path in artifacts]
    missing: dict[str, str] = {}
    for done, name in enumerate(peers):
        progress(done, len(peers), f"making {name}")
        try:
            if ik and name in ik_package.PEERS:
                target = _ik_file(name, dense, folder, threads, ik)
                contenders.append(Contender(name, target, target.stat().st_size, ik, ik.footprint))
                continue
            target = make_peer(name, dense, source, folder, threads, progress)
        except ResourceError:
            raise
        except LosaError as error:
            missing[name] = error.message
            continue
        runtime = ours if name in OURS_DENSE else stock
        contenders.append(Contender(name, target, target.stat().st_size, runtime))
    progress(len(peers), len(peers), "done")
    return contenders, missing


def _ik_file(name: str, dense: Path, folder: Path, threads: int, ik: IkRuntime) -> Path:
    target = folder / f"{dense.stem}-{name}.gguf"
    if not target.is_file():
        unfinished = target.with_suffix(".partial")
        ik_package.quantize(ik.package, dense, unfinished, name, threads)
        unfinished.rename(target)
    return target


def _gguf_bytes(path: Path) -> int:
    """Of the file itself, or of the one that is opened in a folder."""
    return (path if path.is_file() else find_gguf(path)).stat().st_size
