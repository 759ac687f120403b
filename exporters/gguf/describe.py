"""What a GGUF file says of itself, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from losa_deploy.gguf.file import MAGIC, GgufFile, Tensor, open_any
from losa_deploy.gguf.names import ARCHITECTURE, BLOCKS, PACKED, PREFIX
from losa_deploy.gguf.packed import REAL
from losa_deploy.gguf.view import blob_header
from losa_deploy.interfaces import StoredFile, StoredTensor

SUFFIX = ".gguf"
TEXTS = (ARCHITECTURE, REAL, "losa.source", "losa.revision", "losa.value_type", "losa.tool_version")


def describe(path: Path) -> StoredFile | None:
    """Keys of ours and all tensors; None for a file that is no GGUF by its name or first bytes.

    Raises `InputError` if it is damaged.
    """
    if path.suffix.lower() != SUFFIX and not _is_gguf(path):
        return None
    with open_any(path) as file:
        keys = {key: file.text(key) for key in TEXTS}
        sparsity = file.number("losa.sparsity")
        tensors = tuple(_stored(file, tensor) for tensor in file.tensors)
    return StoredFile(
        format="gguf",
        architecture=keys[REAL] or keys[ARCHITECTURE],
        packed=keys[ARCHITECTURE] == PACKED,
        tensors=tensors,
        blocks=tuple(t for t in tensors if t.name.startswith(BLOCKS) and len(t.shape) > 1),
        source=keys["losa.source"],
        revision=keys["losa.revision"],
        sparsity=sparsity if isinstance(sparsity, float) else None,
        value_type=keys["losa.value_type"],
        tool_version=keys["losa.tool_version"],
    )


def _stored(file: GgufFile, tensor: Tensor) -> StoredTensor:
    if tensor.name.startswith(PREFIX):
        header = blob_header(file, tensor)
        name = tensor.name.removeprefix(PREFIX)
        return StoredTensor(name, header.shape, header.layout, header.value_type, tensor.bytes, header.kept)
    shape = tuple(reversed(tensor.dims))
    return StoredTensor(tensor.name, shape, "dense", tensor.type.name.lower(), tensor.bytes)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) == MAGIC
