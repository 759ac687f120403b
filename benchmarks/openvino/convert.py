"""`python -m losa_deploy.benchmarks.openvino.convert PACKAGE FILE FOLDER`: a GGUF file as OpenVINO reads it.

Its reader writes graph and weights beside the file it was given, so it is given a link to the file.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def convert(package: Path, file: Path, folder: Path) -> None:
    """`folder` gets what the reader makes of `file`."""
    sys.path.insert(0, str(package))
    link = folder / file.name
    link.symlink_to(file.resolve())
    try:
        genai = importlib.import_module("openvino_genai")
        genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    finally:
        link.unlink()


if __name__ == "__main__":
    convert(*(Path(word) for word in sys.argv[1:]))
