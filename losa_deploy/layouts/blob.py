"""A packed tensor as one blob: a header of 128 bytes, then its components (docs/formats.md, "Blob").

For containers that store one tensor as one piece of bytes. ONNX keeps the components apart instead,
with the fields of the header as node attributes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import (
    COMPONENTS,
    FORMAT_VERSION,
    LAYOUTS,
    Component,
    PackedTensor,
    PackOptions,
    Shapes,
)
from losa_deploy.layouts.values import VALUE_TYPES
from losa_deploy.layouts.values.base import F16_SCALE, F32_SCALE, GROUP_SIZES, NO_SCALE

MAGIC = b"LOSA"
HEADER_BYTES = 128
ALIGNMENT = 64
FIXED = struct.Struct("<4sHHBBBBBBHIIQ")
"""Magic, version, header bytes, layout, value and scale type, n or rows per mask, m, position bits, groups,
shape, kept."""
MOST = 1 << 30
"""Rows, and columns."""


@dataclass(frozen=True)
class BlobHeader:
    """The first 128 bytes of a blob, checked as far as they can be without its components."""

    layout: str
    value_type: str
    scale_type: int
    """As in `scale_type_id`."""
    shape: tuple[int, int]
    """(out, in)."""
    params: Mapping[str, int]
    kept: int
    places: Mapping[str, tuple[int, int]]
    """Component → offset from the start of the blob, bytes."""


def header_numbers(params: Mapping[str, int]) -> tuple[int, int, int, int]:
    """Parameters of a packed tensor as its header has them: n, m, position bits and group size.

    Rows that share a mask are in the place of n: a reader that does not know of them refuses the number.
    """
    first = params.get("n", params.get("rows_per_mask", 0))
    return first, params.get("m", 0), params.get("position_bits", 0), params.get("group_size", 0)


def scale_type_id(packed: PackedTensor) -> int:
    """0: no scales, 1: f32, 2: f16."""
    scale = packed.arrays.get("scale")
    return NO_SCALE if scale is None else F32_SCALE if scale.dtype == np.float32 else F16_SCALE


def to_blob(packed: PackedTensor) -> bytes:
    """Header and components, each at a multiple of 64 bytes from the start."""
    header = FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        LAYOUTS[packed.layout].number,
        VALUE_TYPES[packed.value_type].number,
        scale_type_id(packed),
        *header_numbers(packed.params),
        *packed.shape,
        packed.nnz,
    )
    table, body = b"", b""
    for name in COMPONENTS:
        component = packed.arrays[name].tobytes() if name in packed.arrays else b""
        offset = HEADER_BYTES + len(body) if component else 0
        table += struct.pack("<QQ", offset, len(component))
        body += component + bytes(-len(component) % ALIGNMENT)
    return (header + table).ljust(HEADER_BYTES, b"\0") + body


def blob_bytes(layout: str, mask: NDArray[np.bool_], options: PackOptions) -> int:
    """Size of the blob that packing a weight with this mask gives, without packing."""
    parts = LAYOUTS[layout].sizes(mask, options).values()
    return HEADER_BYTES + sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)


def read_header(data: bytes, total: int) -> BlobHeader:
    """Header of a blob of `total` bytes that starts with `data`; raises `ValueError` saying what is wrong.

    Its shape is one that the bytes of its components bear out, so that memory can be taken by it.
    """
    if len(data) < HEADER_BYTES or total < HEADER_BYTES:
        raise ValueError(f"{total} bytes are too few for a header of {HEADER_BYTES}")
    magic, version, header, layout, values, scale_type, n, m, bits, group, rows, columns, kept = (
        FIXED.unpack_from(data)
    )
    if (magic, version, header) != (MAGIC, FORMAT_VERSION, HEADER_BYTES):
        raise ValueError(f"no packed tensor of format {FORMAT_VERSION} starts here")
    layouts = {found.number: found for found in LAYOUTS.values()}
    types = {found.number: found for found in VALUE_TYPES.values()}
    if layout not in layouts or values not in types:
        raise ValueError(f"layout {layout} with value type {values} is not in the format")
    if not (1 <= rows <= MOST and 1 <= columns <= MOST and kept <= rows * columns):
        raise ValueError(f"{kept} weights kept of {rows} x {columns} are not in the format")
    kind, name, pattern = types[values], layouts[layout].name, {"n": n, "m": m, "position_bits": bits}
    if not layouts[layout].stores(kind) or not layouts[layout].known((rows, columns), kind, pattern):
        raise ValueError(
            f"{n}:{m} with {bits} position bits, {rows} x {columns} weights of type {kind.name}: "
            f"not in the format for {name}"
        )
    if scale_type not in kind.scale_types or group not in (GROUP_SIZES if kind.grouped else (0,)):
        raise ValueError(f"scale type {scale_type}, groups of {group}: not of the format for {kind.name}")
    params = {"n": n, "m": m} if m else {}
    params |= {"position_bits": bits} if "position_bits" in layouts[layout].parameters else {}
    params |= {"rows_per_mask": n} if n and "rows_per_mask" in layouts[layout].parameters else {}
    params |= {"group_size": group} if group else {}
    places = _places(data, total)
    found = BlobHeader(name, kind.name, scale_type, (rows, columns), params, kept, places)
    _check_sizes(found)
    return found


def from_blob(data: bytes) -> PackedTensor:
    """The packed tensor of a blob; raises `ValueError` for anything that `to_blob` does not write."""
    header = read_header(data[:HEADER_BYTES], len(data))
    types, shapes = _types(header), _shapes(header)
    arrays: dict[str, Component] = {}
    for name in COMPONENTS:
        offset, size = header.places.get(name, (0, 0))
        if size:
            found = np.frombuffer(data, types[name], size // types[name].itemsize, offset)
            shape = shapes.get(name)
            arrays[name] = found if shape is None else found.reshape(shape)
    VALUE_TYPES[header.value_type].check(arrays)
    packed = PackedTensor(header.layout, header.value_type, header.shape, header.params, arrays, header.kept)
    return replace(packed, nnz=LAYOUTS[header.layout].check(packed))


def _check_sizes(header: BlobHeader) -> None:
    """Every component has the bytes that the header asks for; of a stream of values, positions do."""
    types, shapes, (rows, columns) = _types(header), _shapes(header), header.shape
    for name in COMPONENTS:
        _, size = header.places.get(name, (0, 0))
        width = types[name].itemsize
        shape = shapes.get(name, (0,))
        if shape is not None and size != prod(shape) * width:
            raise ValueError(
                f"the component {name} has {size} bytes, "
                f"{rows} x {columns} weights need {prod(shape) * width}"
            )
        if size % width:
            raise ValueError(f"the component {name} has {size} bytes, which is no whole number of values")


def _places(data: bytes, total: int) -> dict[str, tuple[int, int]]:
    """Component → offset, bytes; in order, aligned, without overlap, inside of the blob."""
    places, end = {}, HEADER_BYTES
    for index, name in enumerate(COMPONENTS):
        offset, size = struct.unpack_from("<QQ", data, FIXED.size + 16 * index)
        if size == 0:
            continue
        if offset % ALIGNMENT or offset < end or offset + size > total:
            raise ValueError(
                f"the component {name} lies at {offset}, {size} bytes long, in a blob of {total} bytes"
            )
        places[name], end = (offset, size), offset + size
    return places


def _types(header: BlobHeader) -> dict[str, np.dtype[np.generic]]:
    """Component → dtype."""
    scale: type[np.generic] = np.float32 if header.scale_type == F32_SCALE else np.float16
    values = VALUE_TYPES[header.value_type].stored
    return {
        "positions": np.dtype(np.uint8),
        "values": values,
        "scale": np.dtype(scale),
        "table": np.dtype(np.int8),
    }


def _shapes(header: BlobHeader) -> Shapes:
    """Component → shape, of those that are stored; None for a stream of values."""
    kind = VALUE_TYPES[header.value_type]
    shapes = dict(LAYOUTS[header.layout].shapes(header.shape, kind, header.params))
    if shapes["scale"] is None:
        del shapes["scale"]
    if kind.table_size:
        shapes["table"] = (kind.table_size,)
    return shapes
