"""What llama.cpp is shown of a packed GGUF: the standard model that it means (docs/formats.md, "In GGUF").

A packed file has an architecture and tensors that no stock tool opens. Its standard view has the real
architecture and, for each packed weight, a tensor of the usual name and shape whose bytes are the
header of the blob, filled with zeros. A virtual file that shows it needs the new header and a list of
ranges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.gguf.check import check_keys
from losa_deploy.gguf.file import MAGIC, STRING, GgufFile, Tensor, damaged, open_gguf
from losa_deploy.gguf.names import ARCHITECTURE, PACKED, PREFIX
from losa_deploy.gguf.packed import real_architecture
from losa_deploy.gguf.types import F16, F32, I8, Q1_0, Q4_0, GgmlType, WeightType
from losa_deploy.layouts import unpack
from losa_deploy.layouts.blob import HEADER_BYTES, BlobHeader, from_blob, read_header

VIEW_TYPES = (Q1_0, Q4_0, F16, F32)
"""Types that a view declares, smallest first. llama.cpp sets up memory for every declared byte when it
loads, so the fewer the better."""
CHUNK = 1 << 22
"""Weights that are expanded at once."""


@dataclass(frozen=True)
class Piece:
    """Bytes of the packed file as they appear in the view; of a blob, only its header is shown."""

    at: int
    """Position in the view."""
    offset: int
    """Position in the packed file."""
    bytes: int


@dataclass(frozen=True)
class StandardView:
    """A virtual GGUF file: `header`, then `pieces`; what neither covers reads as zero."""

    header: bytes
    pieces: tuple[Piece, ...]
    total_bytes: int
    blobs: int
    """Tensors that are packed weights."""


def declared(shape: tuple[int, int]) -> tuple[GgmlType, int] | None:
    """The smallest type as which a view can show a packed weight [out, in], and its bytes, or None."""
    for kind in VIEW_TYPES:
        total = kind.nbytes(prod(shape))
        if kind.fits(shape[1]) and total >= HEADER_BYTES:
            return kind, total
    return None


def find_gguf(folder: Path) -> Path:
    """The file of an artifact that is opened: the packed one, else its only other one.

    Raises `InputError` if there is none, or a choice.
    """
    files = sorted(folder.glob("*.gguf"))
    found = [path for path in files if is_packed(path)] or files
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"{folder} should hold one GGUF file, or a packed and a portable one; found {names}.",
            hint="Name one file, or export the model again.",
        )
    return found[0]


def is_packed(path: Path) -> bool:
    """True for a packed file of ours, False for any other GGUF; `InputError` if it is none."""
    try:
        with path.open("rb") as handle:
            start = handle.read(4096)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", hint="Check the path.") from None
    if start[:4] != MAGIC:
        raise damaged(path, f"it starts with {start[:4]!r}, expected {MAGIC!r}")
    # The architecture is the first key by convention; another place is looked for in the whole header.
    first = struct.pack("<Q", len(ARCHITECTURE)) + ARCHITECTURE.encode()
    if start[24 : 24 + len(first)] == first:
        value = struct.pack("<IQ", STRING, len(PACKED)) + PACKED.encode()
        return start[24 + len(first) :].startswith(value)
    with open_gguf(path) as file:
        return file.text(ARCHITECTURE) == PACKED


def standard_view(path: Path) -> StandardView:
    """The view of a packed file; `InputError` if it is none, or damaged, of a later format, or no model."""
    with open_gguf(path) as file:
        architecture = real_architecture(file)
        check_keys(file, architecture)
        shown = [_shown(file, tensor) for tensor in file.tensors]
        header = _header(file, architecture, shown)
    pieces, at = [], _up(len(header), file.alignment)
    for new, tensor in zip(shown, file.tensors, strict=True):
        pieces.append(Piece(at, tensor.offset, tensor.bytes))
        at += _up(new.bytes, file.alignment)
    blobs = sum(map(_is_blob, file.tensors))
    return StandardView(header, tuple(pieces), at, blobs)


def write_expanded(path: Path, target: Path) -> None:
    """Write what a file of ours, packed or portable, means as a plain F32 GGUF, one tensor at a time.

    Raises `InputError` as `standard_view` does.
    """
    with open_gguf(path) as file, target.open("wb") as out:
        architecture = real_architecture(file) if is_packed(path) else file.text(ARCHITECTURE)
        check_keys(file, architecture)
        shown = [_shown(file, tensor) if _is_blob(tensor) else tensor for tensor in file.tensors]
        plain = [Tensor(t.name, t.dims, F32, 0, F32.nbytes(prod(t.dims))) for t in shown]
        header = _header(file, architecture, plain, file_type=0)
        out.write(header + bytes(-len(header) % file.alignment))
        for tensor in file.tensors:
            for part in expanded(file, tensor):
                out.write(np.ascontiguousarray(part, "<f4").data)
            _pad(out, file.alignment)


def expanded(file: GgufFile, tensor: Tensor) -> Iterator[NDArray[np.float32]]:
    """The weights of a tensor as its bytes define them, row by row, in one or several flat pieces."""
    if _is_blob(tensor):
        try:
            yield unpack(from_blob(file.data[tensor.offset : tensor.offset + tensor.bytes])).weight.reshape(
                -1
            )
        except ValueError as error:
            raise damaged(file.path, f"{tensor.name}: {error}") from None
        return
    count, kind = prod(tensor.dims), _weight_type(file, tensor)
    for start in range(0, count, CHUNK):
        part = min(CHUNK, count - start)
        first = tensor.offset + tensor.bytes * start // count
        last = tensor.offset + tensor.bytes * (start + part) // count
        yield kind.decode(file.data[first:last])


def _weight_type(file: GgufFile, tensor: Tensor) -> WeightType:
    """Type of a dense tensor; `InputError` for one that holds no weights."""
    if not isinstance(tensor.type, WeightType):
        raise damaged(file.path, f"{tensor.name} is stored as {tensor.type.name}")
    return tensor.type


def _is_blob(tensor: Tensor) -> bool:
    return tensor.name.startswith(PREFIX)


def _shown(file: GgufFile, tensor: Tensor) -> Tensor:
    """A tensor of the view, its offset left open."""
    if not _is_blob(tensor):
        _weight_type(file, tensor)
        return tensor
    header = blob_header(file, tensor)
    dims = (header.shape[1], header.shape[0])
    found = declared(header.shape)
    if found is None:
        raise damaged(file.path, f"{tensor.name} has {prod(dims)} weights, fewer than are packed")
    return Tensor(tensor.name.removeprefix(PREFIX), dims, found[0], 0, found[1])


def blob_header(file: GgufFile, tensor: Tensor) -> BlobHeader:
    """Header of a packed tensor; `InputError` if it is none."""
    try:
        if tensor.type != I8 or len(tensor.dims) != 1:
            raise ValueError(f"it is stored as {tensor.type.name} with dimensions {tensor.dims}")
        return read_header(file.data[tensor.offset : tensor.offset + HEADER_BYTES], tensor.bytes)
    except ValueError as error:
        raise damaged(file.path, f"{tensor.name}: {error}") from None


def _header(
    file: GgufFile, architecture: str, tensors: Sequence[Tensor], file_type: int | None = None
) -> bytes:
    """Keys of the file with another architecture, and these tensors one after another."""
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise damaged(file.path, f"it has {twice} both packed and dense")
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(file.keys))]
    for key, value in file.keys.items():
        content = file.raw(key)
        if key == ARCHITECTURE:
            content = _text(architecture)
        elif key == "general.file_type" and file_type is not None and value.type == 4:
            content = struct.pack("<I", file_type)
        parts += [_text(key), struct.pack("<I", value.type), content]
    offset = 0
    for tensor in tensors:
        parts += [_text(tensor.name), struct.pack("<I", len(tensor.dims))]
        parts.append(struct.pack(f"<{len(tensor.dims)}QIQ", *tensor.dims, tensor.type.id, offset))
        offset += _up(tensor.bytes, file.alignment)
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(bytes(-out.tell() % alignment))
