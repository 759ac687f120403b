"""OpenVINO behind the interface of a runtime: each session is a process of `worker.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from losa_deploy.interfaces import Runtime

from ..memory import Footprint, run_probe
from ..process_session import ProcessSession
from .package import MODEL, last_words

PROGRAM = "OpenVINO"
WORKER = "losa_deploy.benchmarks.openvino.worker"


class OpenvinoRuntime(Runtime):
    """Opens what `package.convert` writes."""

    name = "openvino"
    opens = f"a folder with {MODEL}"
    preference = -1

    def __init__(self, package: Path) -> None:
        """`package` is the folder that OpenVINO is imported from."""
        self.package = package

    def supports(self, folder: Path) -> bool:
        """True if there is a graph."""
        return (folder / MODEL).is_file()

    def open(self, folder: Path, *, threads: int) -> ProcessSession:
        """Start a process that holds the model; raises what it cannot do as a `LosaError`."""
        return ProcessSession(self._command(folder, threads), folder, PROGRAM, last_words)

    def footprint(self, folder: Path, threads: int) -> Footprint:
        """As `measure_footprint`: of a fresh process."""
        return run_probe([*self._command(folder, threads), "--probe", "64", "16"], folder, timeout=600.0)

    def _command(self, folder: Path, threads: int) -> list[str]:
        return [sys.executable, "-m", WORKER, str(self.package), str(folder), str(threads)]
