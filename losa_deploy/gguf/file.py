"""The header of a GGUF file, read without trust: keys as byte ranges, tensors with checked places.

The only reader of files from elsewhere: the one of the `gguf` package believes the sizes that it finds, and
makes arrays of all tokens and merges, which takes longer than llama.cpp needs to load a small model. Here
every size is checked before it is used, and a value is skipped unless it is asked for. Converting a GGUF
goes through transformers, which reads the file with that package, once this reader has accepted it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.gguf.types import GgmlType, any_type, own_type

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF number type → `struct` format."""
MOST = 1 << 20
"""Keys, and tensors."""
_Described = tuple[str, tuple[int, ...], int, int]
"""Name, dimensions, number of the type, and offset of a tensor, as they are in the header."""
_Find = Callable[[int], GgmlType]


@dataclass(frozen=True)
class Value:
    """One key: its type, and where the value lies in the file (behind the type)."""

    type: int
    start: int
    end: int


@dataclass(frozen=True)
class Tensor:
    """One tensor as the header describes it."""

    name: str
    dims: tuple[int, ...]
    """Innermost first: (in, out) of a weight [out, in]."""
    type: GgmlType
    offset: int
    """From the start of the file."""
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Keys of a file, and the shapes of its tensors, of whatever type; `data` is the mapped file."""

    path: Path
    data: mmap.mmap
    version: int
    keys: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor → dimensions, innermost first; places and sizes are not checked."""

    def text(self, key: str) -> str:
        """A string value, "" if there is none."""
        value = self.keys.get(key)
        if value is None or value.type != STRING:
            return ""
        return self.data[value.start + 8 : value.end].decode("utf-8", "replace")

    def number(self, key: str) -> int | float | None:
        """A number or flag, None if there is none."""
        value = self.keys.get(key)
        if value is None or value.type not in SCALARS:
            return None
        found: int | float = struct.unpack_from("<" + SCALARS[value.type], self.data, value.start)[0]
        return found

    def array_length(self, key: str) -> int | None:
        """Entries of an array, None if there is none."""
        value = self.keys.get(key)
        if value is None or value.type != ARRAY:
            return None
        count: int = struct.unpack_from("<Q", self.data, value.start + 4)[0]
        return count

    def raw(self, key: str) -> bytes:
        """A value as it is in the file, without its type."""
        return self.data[self.keys[key].start : self.keys[key].end]


@dataclass(frozen=True)
class GgufFile(GgufHeader):
    """A file whose tensors have known types, and places inside of it."""

    tensors: tuple[Tensor, ...]
    alignment: int


@contextmanager
def open_gguf(path: Path) -> Iterator[GgufFile]:
    """The file with its header read; `InputError` if it is damaged, or has types that our files do not."""
    with _mapped(path) as data:
        yield _read(path, data, own_type)


@contextmanager
def open_any(path: Path) -> Iterator[GgufFile]:
    """The same for a file with any of ggml's types."""
    with _mapped(path) as data:
        yield _read(path, data, any_type)


@contextmanager
def open_header(path: Path) -> Iterator[GgufHeader]:
    """Header of any GGUF, whatever its tensors are stored as; `InputError` if it is damaged."""
    with _mapped(path) as data:
        header, _ = _read_header(path, _Cursor(data))
        yield header


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", hint="Check the path of the GGUF file."
        ) from None
    except _Damage as damage:
        raise damaged(path, str(damage)) from None
    except ValueError as error:
        if path.is_file() and path.stat().st_size == 0:
            raise damaged(path, "it is empty") from None
        raise damaged(path, str(error)) from None


def damaged(path: Path, what: str) -> InputError:
    """The error about a GGUF file that is not as it must be."""
    return InputError(f"{path} is no sound GGUF file: {what}.", hint="Copy or download it again.")


class _Damage(ValueError):
    pass


class _Cursor:
    """Reads forward, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def skip(self, count: int) -> int:
        """Where the next `count` bytes start."""
        start = self.at
        if count > self.size - start:
            raise _Damage(f"it ends after {self.size} bytes, inside of its header")
        self.at = start + count
        return start

    def u32(self) -> int:
        value: int = struct.unpack_from("<I", self.data, self.skip(4))[0]
        return value

    def u64(self) -> int:
        value: int = struct.unpack_from("<Q", self.data, self.skip(8))[0]
        return value

    def text(self) -> str:
        length = self.u64()
        start = self.skip(length)
        if length > 65535:
            raise _Damage(f"a name is {length} bytes long")
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self) -> Value:
        kind = self.u32()
        start = self.at
        if kind == ARRAY:
            self.array()
        elif kind == STRING:
            self.skip(self.u64())
        else:
            self.scalars(kind, 1)
        return Value(kind, start, self.at)

    def array(self) -> None:
        kind, count = self.u32(), self.u64()
        if kind != STRING:
            self.scalars(kind, count)
            return
        if count > self.size // 8:
            raise _Damage(f"it claims an array of {count} strings")
        data, at, size, unpack = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > size:
                raise _Damage(f"it ends after {size} bytes, inside of its header")
            at += 8 + unpack(data, at)[0]
        self.at = min(at, size)
        self.skip(at - self.at)

    def scalars(self, kind: int, count: int) -> None:
        if kind not in SCALARS:
            raise _Damage(f"it has a value of the unknown type {kind}")
        self.skip(count * struct.calcsize(SCALARS[kind]))


def _read(path: Path, data: mmap.mmap, find: _Find) -> GgufFile:
    cursor = _Cursor(data)
    header, described = _read_header(path, cursor)
    alignment = _alignment(data, header.keys.get("general.alignment"))
    start = -(-cursor.at // alignment) * alignment
    tensors = _placed([_typed(*tensor, find) for tensor in described], start, alignment, len(data))
    return GgufFile(path, data, header.version, header.keys, header.shapes, tensors, alignment)


def _read_header(path: Path, cursor: _Cursor) -> tuple[GgufHeader, list[_Described]]:
    data = cursor.data
    cursor.skip(4)
    if data[:4] != MAGIC:
        raise _Damage(f"it starts with {data[:4]!r}, expected {MAGIC!r}")
    version, tensor_count, key_count = cursor.u32(), cursor.u64(), cursor.u64()
    if version not in VERSIONS:
        raise _Damage(f"it has version {version}, expected 2 or 3 (little-endian)")
    if max(tensor_count, key_count) > MOST:
        raise _Damage(f"it claims {tensor_count} tensors and {key_count} keys")
    keys: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in keys:
            raise _Damage(f"it has the key {key} twice")
        keys[key] = cursor.value()
    described = [_tensor_info(cursor) for _ in range(tensor_count)]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, dims, _kind, _offset in described:
        if name in shapes:
            raise _Damage(f"it has the tensor {name} twice")
        shapes[name] = dims
    return GgufHeader(path, data, version, keys, shapes), described


def _alignment(data: mmap.mmap, value: Value | None) -> int:
    if value is None:
        return 32
    found: int = struct.unpack_from("<I", data, value.start)[0] if value.type == 4 else 0
    if found < 8 or found & (found - 1) or found > 1 << 20:
        raise _Damage(f"it asks for an alignment of {found} bytes")
    return found


def _tensor_info(cursor: _Cursor) -> _Described:
    name, count = cursor.text(), cursor.u32()
    if not 1 <= count <= 4:
        raise _Damage(f"the tensor {name} has {count} dimensions")
    dims = tuple(cursor.u64() for _ in range(count))
    return name, dims, cursor.u32(), cursor.u64()


def _typed(name: str, dims: tuple[int, ...], number: int, offset: int, find: _Find) -> Tensor:
    """A tensor whose offset counts from the first one."""
    try:
        kind = find(number)
    except ValueError as error:
        raise _Damage(f"the tensor {name} has {error}") from None
    if min(dims) < 1 or prod(dims) > 1 << 48 or not kind.fits(dims[0]):
        raise _Damage(f"the tensor {name} has dimensions {dims}")
    return Tensor(name, dims, kind, offset, kind.nbytes(prod(dims)))


def _placed(found: list[Tensor], start: int, alignment: int, size: int) -> tuple[Tensor, ...]:
    """Tensors one after another from `start`, none beyond the end of the file."""
    tensors: list[Tensor] = []
    end = start
    for tensor in found:
        place = start + tensor.offset
        if tensor.offset % alignment or place < end or place + tensor.bytes > size:
            raise _Damage(
                f"the tensor {tensor.name} should lie at {place}, {tensor.bytes} bytes long, in a file of "
                f"{size} bytes"
            )
        tensors.append(replace(tensor, offset=place))
        end = place + tensor.bytes
    return tuple(tensors)
