"""Where OpenVINO GenAI lies, and what it makes of a GGUF file."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from losa_deploy.errors import LosaError, MissingError

DISTRIBUTION = "openvino-genai"
TESTED = "2026.4.1.0"
PEERS = ("openvino-q4_0", "openvino-q8_0", "openvino-q4_k_m")
"""Names of peers: after the dash the type that llama.cpp quantizes to."""
MODEL, DATA = "openvino_model.xml", "openvino_model.bin"
CONVERTER = "losa_deploy.benchmarks.openvino.convert"


def find_package(folder: Path | None) -> Path:
    """The folder to import from: `folder`, or that of this environment; `MissingError` if it is not there."""
    at = [str(folder)] if folder else sys.path
    for distribution in metadata.distributions(name=DISTRIBUTION, path=at):
        return Path(str(distribution.locate_file(""))).resolve()
    where = f"in {folder}" if folder else "in this environment"
    raise MissingError(
        f"It needs {DISTRIBUTION}, which is not installed {where}.",
        hint=f"Run `pip install --target DIR {DISTRIBUTION}=={TESTED}` and add --openvino-path DIR.",
    )


def convert(package: Path, file: Path, folder: Path) -> None:
    """Write OpenVINO's own form of a GGUF file into the existing folder; `LosaError` with its last words."""
    command = [sys.executable, "-m", CONVERTER, str(package), str(file), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not (folder / MODEL).is_file():
        raise LosaError(
            f"OpenVINO cannot read {file.name}: {last_words(done.stdout + done.stderr)}", hint="Leave it out."
        )


def last_words(said: str) -> str:
    """The line that tells why a process of it ended: after where it was raised, which is several lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1]


def model_bytes(folder: Path) -> int:
    """Bytes of graph and weights."""
    return sum((folder / name).stat().st_size for name in (MODEL, DATA))
