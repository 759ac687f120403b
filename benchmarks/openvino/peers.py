"""Peers in OpenVINO: files that llama.cpp has quantized, as OpenVINO GenAI reads them."""

from __future__ import annotations

from losa_deploy.output import remove

from ..gguf_peers import make_peer
from ..peer_kinds import Material
from ..synthetic.peers import Contender
from .package import PEERS, convert, find_package, model_bytes
from .runtime import OpenvinoRuntime


class OpenvinoPeers:
    """Quantizations by llama.cpp, in OpenVINO."""

    names = PEERS

    def make(self, name: str, material: Material) -> Contender:
        """The folder of the peer; `MissingError` where OpenVINO GenAI is not installed."""
        m, package = material, find_package(material.openvino_folder)
        target = m.folder / f"{m.dense.stem}-{name}"
        if not target.is_dir():
            file = make_peer(
                name.removeprefix("openvino-"), m.dense, m.source, m.folder, m.threads, m.progress
            )
            unfinished = target.with_name(f"{target.name}.partial")
            remove(unfinished)
            unfinished.mkdir()
            try:
                convert(package, file, unfinished)
                unfinished.rename(target)
            finally:
                remove(unfinished)
        runtime = OpenvinoRuntime(package)
        return Contender(name, target, model_bytes(target), runtime, runtime.footprint)
