"""What a real model is compared with: quantizations of it by others, and our own dense i4 and i3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from losa_deploy.errors import InputError, LosaError, MissingError, ResourceError
from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import Runtime
from losa_deploy.plugins import load_runtime

from .gguf_peers import FORMAT, GgufPeers, real_peers
from .ik import package as ik_package
from .ik.runtime import IkRuntime
from .openvino.peers import OpenvinoPeers
from .ort_peers import OrtPeers
from .peer_kinds import Material, PeerKind
from .report.baseline import baseline_name
from .synthetic.geometry import model_bytes
from .synthetic.peers import LLAMACPP, ONNX_RUNTIME, Contender


def all_real_peers() -> tuple[str, ...]:
    """Those of other runtimes too."""
    return (*real_peers(), *(name for kind in OTHERS for name in kind.names), *ik_package.PEERS)


def peer_runtime(artifacts: Sequence[Path]) -> Runtime:
    """Where GGUF files meet; raises `InputError` for an artifact that neither it nor ONNX Runtime opens."""
    for path in artifacts:
        artifact_runtime(path)
    return load_runtime(LLAMACPP)


def artifact_runtime(path: Path) -> Runtime:
    """Where a file of the user's own is measured; raises `InputError` for another kind of folder."""
    for name in (LLAMACPP, ONNX_RUNTIME):
        runtime = load_runtime(name)
        if runtime.supports(path):
            return runtime
    raise InputError(
        f"{path} holds no GGUF file and no ONNX model, which are what --peers compares.",
        hint="Leave --peers out, or export with --format gguf.",
    )


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


class IkPeers:
    """Quantizations by ik_llama.cpp, in it."""

    names = tuple(ik_package.PEERS)

    def __init__(self, ik: IkRuntime) -> None:
        self._ik = ik

    def make(self, name: str, material: Material) -> Contender:
        """The file of the peer."""
        target = material.folder / f"{material.dense.stem}-{name}.gguf"
        if not target.is_file():
            unfinished = target.with_suffix(".partial")
            ik_package.quantize(self._ik.package, material.dense, unfinished, name, material.threads)
            unfinished.rename(target)
        return Contender(name, target, target.stat().st_size, self._ik, self._ik.footprint)


OTHERS: tuple[PeerKind, ...] = (OrtPeers(), OpenvinoPeers())
"""Peers of other runtimes. Another one is another entry."""


def real_contenders(
    artifacts: Sequence[Path],
    peers: Sequence[str],
    material: Material,
    *,
    ik: IkRuntime | None = None,
) -> tuple[list[Contender], dict[str, str]]:
    """Artifacts, and peers of their dense model.

    Peers of ik_llama.cpp run in `ik`. The second result is peer → reason, of those that cannot be made of
    this model or on this machine. Raises `ResourceError` if there is no room for one.
    """
    kinds: list[PeerKind] = [GgufPeers(), *OTHERS, *([IkPeers(ik)] if ik else [])]
    by_name = {name: kind for kind in kinds for name in kind.names}
    contenders = [
        Contender(str(path), path, _artifact_bytes(path), artifact_runtime(path), own=True)
        for path in artifacts
    ]
    missing: dict[str, str] = {}
    for done, name in enumerate(peers):
        material.progress(done, len(peers), f"making {name}")
        try:
            contenders.append(by_name[name].make(name, material))
        except ResourceError:
            raise
        except MissingError as error:
            missing[name] = str(error)
        except LosaError as error:
            missing[name] = error.message
    material.progress(len(peers), len(peers), "done")
    return contenders, missing


def _artifact_bytes(path: Path) -> int:
    """Of the GGUF file, or of the one that is opened in a folder; of an ONNX folder, graph and data."""
    if path.is_file() or any(path.glob("*.gguf")):
        return (path if path.is_file() else find_gguf(path)).stat().st_size
    return model_bytes(path)
