"""Built libraries inside the installed package."""

from __future__ import annotations

import importlib.util
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
