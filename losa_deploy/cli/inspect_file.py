"""`losa-deploy inspect FILE`: what a single file says of itself, in the words of its format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from losa_deploy.interfaces import StoredFile


def described(path: Path) -> StoredFile:
    """What the first installed format that knows the file reads in it; `InputError` if none does."""
    from losa_deploy import plugins

    known = plugins.usable_exporters()
    for exporter in known:
        found = exporter.describe(path)
        if found is not None:
            return found
    raise InputError(
        f"{path} is no file that an installed format ({', '.join(e.name for e in known)}) can describe.",
        hint="Give the folder written by merge or export.",
    )


def document(found: StoredFile, path: Path) -> dict[str, object]:
    """The `losa.inspect/1` document of a file."""
    return {
        "schema": "losa.inspect/1",
        "kind": "file",
        "format": found.format,
        "packed": found.packed,
        "architecture": found.architecture,
        "source": {"id": found.source, "revision": found.revision},
        "sparsity_achieved": found.sparsity,
        "value_type": found.value_type,
        "tool_version": found.tool_version,
        "bits_per_weight": found.bits_per_weight,
        "size_bytes": path.stat().st_size,
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "layout": tensor.layout,
                "value_type": tensor.value_type,
                "nnz": tensor.kept,
                "bytes": tensor.bytes,
                "bits_per_weight": tensor.bits_per_weight,
                "sparsity": tensor.sparsity,
            }
            for tensor in found.tensors
        ],
    }


def rows(found: StoredFile, path: Path) -> list[tuple[str, str]]:
    """What is said above the table of tensors."""
    kind = "packed" if found.packed else "portable"
    lines = [("file", f"{path} ({found.format.upper()}, {found.architecture}, {kind})")]
    if found.source:
        revision = f" @ {found.revision}" if found.revision else ""
        lines.append(("source", f"{found.source}{revision}"))
    if found.tool_version:
        lines.append(("written by", f"losa-deploy {found.tool_version}"))
    if found.sparsity is not None:
        lines.append(("sparsity", f"{found.sparsity:.4f}"))
    lines.append(("bits per weight", f"{found.bits_per_weight:.3f} over the block linears"))
    return [*lines, ("size", f"{path.stat().st_size / 1e6:.1f} MB")]


def tensor_rows(found: StoredFile) -> list[tuple[str, ...]]:
    """One row per tensor."""
    return [
        (
            tensor.name,
            "x".join(map(str, tensor.shape)),
            tensor.layout,
            tensor.value_type,
            "" if tensor.sparsity is None else f"{tensor.sparsity:.4f}",
            f"{tensor.bytes:,}",
            f"{tensor.bits_per_weight:.3f}",
        )
        for tensor in found.tensors
    ]
