"""`losa-deploy inspect FILE.gguf`: what the file itself says, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from losa_deploy.gguf.file import GgufFile, Tensor, open_any
from losa_deploy.gguf.names import ARCHITECTURE, BLOCKS, PACKED, PREFIX
from losa_deploy.gguf.packed import REAL
from losa_deploy.gguf.view import blob_header

TEXTS = (ARCHITECTURE, REAL, "losa.source", "losa.revision", "losa.value_type", "losa.tool_version")


@dataclass(frozen=True)
class Stored:
    """One tensor as the file stores it; `kept` is known of packed ones only."""

    name: str
    shape: tuple[int, ...]
    layout: str
    value_type: str
    bytes: int
    kept: int | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / max(1, prod(self.shape))

    @property
    def sparsity(self) -> float | None:
        """Share of positions without a stored value."""
        return None if self.kept is None else 1.0 - self.kept / max(1, prod(self.shape))


def document(path: Path) -> dict[str, object]:
    """The `losa.inspect/1` document of a file; `InputError` if it is damaged."""
    with open_any(path) as file:
        keys = {key: file.text(key) for key in TEXTS}
        sparsity = file.number("losa.sparsity")
        tensors = [_stored(file, tensor) for tensor in file.tensors]
    blocks = [tensor for tensor in tensors if tensor.name.startswith(BLOCKS) and len(tensor.shape) > 1]
    positions = max(1, sum(prod(tensor.shape) for tensor in blocks))
    return {
        "schema": "losa.inspect/1",
        "kind": "file",
        "format": "gguf",
        "packed": keys[ARCHITECTURE] == PACKED,
        "architecture": keys[REAL] or keys[ARCHITECTURE],
        "source": {"id": keys["losa.source"], "revision": keys["losa.revision"]},
        "sparsity_achieved": sparsity,
        "value_type": keys["losa.value_type"],
        "tool_version": keys["losa.tool_version"],
        "bits_per_weight": 8.0 * sum(tensor.bytes for tensor in blocks) / positions,
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
            for tensor in tensors
        ],
    }


def rows(found: Mapping[str, object], path: Path) -> list[tuple[str, str]]:
    """What is said above the table of tensors."""
    source = found["source"]
    assert isinstance(source, dict)
    kind = "packed" if found["packed"] else "portable"
    lines = [("file", f"{path} (GGUF, {found['architecture']}, {kind})")]
    if source["id"]:
        revision = f" @ {source['revision']}" if source["revision"] else ""
        lines.append(("source", f"{source['id']}{revision}"))
    if found["tool_version"]:
        lines.append(("written by", f"losa-deploy {found['tool_version']}"))
    sparsity = found["sparsity_achieved"]
    if isinstance(sparsity, float):
        lines.append(("sparsity", f"{sparsity:.4f}"))
    lines.append(("bits per weight", f"{found['bits_per_weight']:.3f} over the block linears"))
    return [*lines, ("size", f"{path.stat().st_size / 1e6:.1f} MB")]


def tensor_rows(found: Mapping[str, object]) -> list[tuple[str, ...]]:
    """One row per tensor."""
    tensors = found["tensors"]
    assert isinstance(tensors, list)
    return [
        (
            str(t["name"]),
            "x".join(map(str, t["shape"])),
            str(t["layout"]),
            str(t["value_type"]),
            "" if t["sparsity"] is None else f"{t['sparsity']:.4f}",
            f"{t['bytes']:,}",
            f"{t['bits_per_weight']:.3f}",
        )
        for t in tensors
    ]


def _stored(file: GgufFile, tensor: Tensor) -> Stored:
    if tensor.name.startswith(PREFIX):
        header = blob_header(file, tensor)
        name = tensor.name.removeprefix(PREFIX)
        return Stored(name, header.shape, header.layout, header.value_type, tensor.bytes, header.kept)
    shape = tuple(reversed(tensor.dims))
    return Stored(tensor.name, shape, "dense", tensor.type.name.lower(), tensor.bytes)
