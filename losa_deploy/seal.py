"""Hashes of all files of a folder, kept beside it: a later run sees a damaged byte before it uses the folder.

A folder of intermediate results is sealed when it is complete. `<folder>.seal` covers every file, the
manifest too, which cannot hold a hash of itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from losa_deploy.manifest import sha256_file

SEAL = ".seal"


def seal_path(folder: Path) -> Path:
    """`<folder>.seal`."""
    return folder.with_name(folder.name + SEAL)


def seal(folder: Path) -> None:
    """Write the seal of a complete folder, replacing an older one in one move."""
    path = seal_path(folder)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_hashes(folder), indent=1) + "\n", "utf-8")
    os.replace(partial, path)


def damage(folder: Path) -> str:
    """The first difference between a folder and its seal, "" if there is none."""
    try:
        sealed = json.loads(seal_path(folder).read_text("utf-8"))
    except (OSError, ValueError):
        return f"{folder} was not finished"
    found = _hashes(folder)
    if not isinstance(sealed, dict):
        return f"{seal_path(folder)} is damaged"
    for name in sorted(sealed.keys() | found.keys()):
        if sealed.get(name) != found.get(name):
            change = "is missing" if name not in found else "was added" if name not in sealed else "changed"
            return f"{folder / name} {change} since it was written"
    return ""


def _hashes(folder: Path) -> dict[str, str]:
    """Relative POSIX name → sha256 of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
