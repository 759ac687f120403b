"""ik_llama.cpp behind the interface of a runtime: each session is a process of `worker.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from losa_deploy.gguf.view import find_gguf
from losa_deploy.interfaces import Runtime

from ..memory import Footprint, run_probe
from ..process_session import ProcessSession
from .package import IkPackage, last_words

PROGRAM = "ik_llama.cpp"
WORKER = "losa_deploy.benchmarks.ik.worker"


class IkRuntime(Runtime):
    """Opens dense GGUF files in ik_llama.cpp, repacking their weights."""

    name = "ik"
    opens = "a GGUF file, or a folder with one"
    preference = -1

    def __init__(self, package: IkPackage) -> None:
        self.package = package

    def supports(self, folder: Path) -> bool:
        """True for a .gguf file, or a folder with one."""
        return folder.suffix == ".gguf" or any(folder.glob("*.gguf"))

    def open(self, folder: Path, *, threads: int) -> ProcessSession:
        """Start a process that holds the model; raises what it cannot do as a `LosaError`."""
        return ProcessSession(self._command(folder, threads), folder, PROGRAM, last_words)

    def footprint(self, folder: Path, threads: int) -> Footprint:
        """As `measure_footprint`: of a fresh process."""
        return run_probe([*self._command(folder, threads), "--probe", "64", "16"], folder, timeout=600.0)

    def _command(self, folder: Path, threads: int) -> list[str]:
        path = folder if folder.is_file() else find_gguf(folder)
        return [sys.executable, "-m", WORKER, str(self.package.folder), str(path), str(threads)]
