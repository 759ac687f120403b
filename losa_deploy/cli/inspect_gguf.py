"""`losa-deploy inspect FILE.gguf`: what the file itself says, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.gguf.file import MAGIC, TYPE_NAMES, GgufFile, Tensor, open_gguf
from losa_deploy.gguf.view import PREFIX, blob_header

TEXTS = ("losa.source", "losa.revision", "losa.value_type", "losa.tool_version", "general.license")


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
    keys, tensors = _read(path)
    blocks = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    positions = max(1, sum(prod(tensor.shape) for tensor in blocks))
    return {
        "schema": "losa.inspect/1",
        "kind": "file",
        "format": "gguf",
        "packed": keys.get("general.architecture") == "losa-packed",
        "architecture": keys.get("losa.architecture") or keys.get("general.architecture", ""),
        "source": {"id": keys.get("losa.source", ""), "revision": keys.get("losa.revision", "")},
        "sparsity_achieved": keys.get("losa.sparsity"),
        "value_type": keys.get("losa.value_type", ""),
        "tool_version": keys.get("losa.tool_version", ""),
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


def _read(path: Path) -> tuple[dict[str, object], list[Stored]]:
    """Keys of interest, and the tensors; types that our files do not use are read by the `gguf` package."""
    try:
        with open_gguf(path) as file:
            keys: dict[str, object] = {key: file.text(key) for key in (*TEXTS, "general.architecture")}
            keys |= {"losa.architecture": file.text("losa.architecture")}
            keys["losa.sparsity"] = file.number("losa.sparsity")
            return keys, [_stored(file, tensor) for tensor in file.tensors]
    except InputError as error:
        if not _is_gguf(path):
            raise
        return _read_any(path, error)


def _stored(file: GgufFile, tensor: Tensor) -> Stored:
    if tensor.name.startswith(PREFIX):
        header = blob_header(file, tensor)
        name = tensor.name.removeprefix(PREFIX)
        return Stored(name, header.shape, header.layout, header.value_type, tensor.bytes, header.kept)
    shape = tuple(reversed(tensor.dims))
    return Stored(tensor.name, shape, "dense", TYPE_NAMES[tensor.type].lower(), tensor.bytes)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


def _read_any(path: Path, first: InputError) -> tuple[dict[str, object], list[Stored]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = [
            Stored(
                t.name,
                tuple(int(n) for n in reversed(t.shape)),
                "dense",
                t.tensor_type.name.lower(),
                int(t.n_bytes),
            )
            for t in reader.tensors
        ]
        field = reader.get_field("general.architecture")
    except (ValueError, KeyError, IndexError, OSError):
        raise first from None
    return {"general.architecture": "" if field is None else str(field.contents())}, tensors
