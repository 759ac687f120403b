"""Built libraries inside the installed package: where they are, and what they are called."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from losa_deploy.errors import MissingError

PACKAGE = "losa_deploy"


def packaged_library(name: str, purpose: str) -> Path:
    """The file `name` of the package; `MissingError`, which says its `purpose`, if it is not there.

    In an editable install the package has several folders; the built files are in one of them.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or ()) if package else []
    for folder in folders:
        path = Path(folder) / name
        if path.is_file():
            return path
    raise MissingError(
        f"The library {name} ({purpose}) is not in the package {PACKAGE} "
        f"({', '.join(map(str, folders)) or 'which is not installed'}).",
        hint="Install it again with `pip install --force-reinstall --no-deps losa-deploy`.",
    )


def library_name(platform: str = sys.platform) -> str:
    """File name of the library on a platform, named as in `sys.platform`."""
    if platform == "win32":
        return "losa_ort.dll"
    return "liblosa_ort.dylib" if platform == "darwin" else "liblosa_ort.so"


def library_path() -> Path:
    """The library inside the installed package; `MissingError` if it is not there."""
    return packaged_library(library_name(), "native operators for ONNX Runtime")
