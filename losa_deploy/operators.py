"""Where the native operators for ONNX Runtime are: a library inside the installed package."""

from __future__ import annotations

import sys
from pathlib import Path

from losa_deploy.packaged import packaged_library


def library_name(platform: str = sys.platform) -> str:
    """File name of the library on a platform, named as in `sys.platform`."""
    if platform == "win32":
        return "losa_ort.dll"
    return "liblosa_ort.dylib" if platform == "darwin" else "liblosa_ort.so"


def library_path() -> Path:
    """The library inside the installed package; `MissingError` if it is not there."""
    return packaged_library(library_name(), "native operators for ONNX Runtime")
