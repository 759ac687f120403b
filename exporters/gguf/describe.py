"""What a GGUF file says of itself, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.gguf.file import MAGIC, TYPE_NAMES, GgufFile, Tensor, open_gguf
from losa_deploy.gguf.view import ARCHITECTURE, PACKED, PREFIX, blob_header
from losa_deploy.interfaces import StoredFile, StoredTensor

SUFFIX = ".gguf"
TEXTS = ("losa.source", "losa.revision", "losa.value_type", "losa.tool_version", "losa.architecture")


def describe(path: Path) -> StoredFile | None:
    """Keys of ours and all tensors; None for a file that is no GGUF by its name or first bytes.

    Raises `InputError` if it is damaged.
    """
    if path.suffix.lower() != SUFFIX and not _is_gguf(path):
        return None
    keys, tensors = _read(path)
    sparsity, architecture = keys.get("losa.sparsity"), str(keys.get(ARCHITECTURE) or "")
    return StoredFile(
        format="gguf",
        architecture=str(keys.get("losa.architecture") or architecture),
        packed=architecture == PACKED,
        tensors=tuple(tensors),
        blocks=tuple(t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1),
        source=str(keys.get("losa.source") or ""),
        revision=str(keys.get("losa.revision") or ""),
        sparsity=sparsity if isinstance(sparsity, float) else None,
        value_type=str(keys.get("losa.value_type") or ""),
        tool_version=str(keys.get("losa.tool_version") or ""),
    )


def _read(path: Path) -> tuple[dict[str, object], list[StoredTensor]]:
    """Keys of interest, and the tensors; types that our files do not use are read by the `gguf` package."""
    try:
        with open_gguf(path) as file:
            keys: dict[str, object] = {key: file.text(key) for key in (*TEXTS, ARCHITECTURE)}
            keys["losa.sparsity"] = file.number("losa.sparsity")
            return keys, [_stored(file, tensor) for tensor in file.tensors]
    except InputError as error:
        if not _is_gguf(path):
            raise
        return _read_any(path, error)


def _stored(file: GgufFile, tensor: Tensor) -> StoredTensor:
    if tensor.name.startswith(PREFIX):
        header = blob_header(file, tensor)
        name = tensor.name.removeprefix(PREFIX)
        return StoredTensor(name, header.shape, header.layout, header.value_type, tensor.bytes, header.kept)
    shape = tuple(reversed(tensor.dims))
    return StoredTensor(tensor.name, shape, "dense", TYPE_NAMES[tensor.type].lower(), tensor.bytes)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC


def _read_any(path: Path, first: InputError) -> tuple[dict[str, object], list[StoredTensor]]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tensors = [
            StoredTensor(
                t.name,
                tuple(int(n) for n in reversed(t.shape)),
                "dense",
                t.tensor_type.name.lower(),
                int(t.n_bytes),
            )
            for t in reader.tensors
        ]
        field = reader.get_field(ARCHITECTURE)
    except (ValueError, KeyError, IndexError, OSError):
        raise first from None
    return {ARCHITECTURE: "" if field is None else str(field.contents())}, tensors
