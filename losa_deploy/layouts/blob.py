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

from losa_deploy.layouts import tiled
from losa_deploy.layouts.base import (
    COMPONENTS,
    FORMAT_VERSION,
    LAYOUTS,
    Component,
    PackedTensor,
    PackOptions,
    ValueType,
)
from losa_deploy.layouts.bitmask import row_bytes
from losa_deploy.layouts.nm import (
    find_pattern,
    load_positions,
    position_bits,
    positions_row_bytes,
    store_positions,
)
from losa_deploy.layouts.streams import stream_bytes
from losa_deploy.layouts.values import code_dtype, group_count, scale_bytes

MAGIC = b"LOSA"
HEADER_BYTES = 128
ALIGNMENT = 64
LAYOUT_IDS = {"dense": 0, "bitmask": 1, "nm": 2, "tiled": 3}
VALUE_TYPE_IDS: dict[ValueType, int] = {"f32": 0, "f16": 1, "i8": 2, "i4": 3}
FIXED = struct.Struct("<4sHHBBBBBBHIIQ")
"""Magic, version, header bytes, layout, value and scale type, n, m, position bits, groups, shape, kept."""
MOST = 1 << 30
"""Rows, and columns."""


@dataclass(frozen=True)
class BlobHeader:
    """The first 128 bytes of a blob, checked as far as they can be without its components."""

    layout: str
    value_type: ValueType
    scale_type: int
    """As in `scale_type_id`."""
    shape: tuple[int, int]
    """(out, in)."""
    params: Mapping[str, int]
    kept: int
    places: Mapping[str, tuple[int, int]]
    """Component → offset from the start of the blob, bytes."""


def scale_type_id(packed: PackedTensor) -> int:
    """0: no scales, 1: f32, 2: f16."""
    scale = packed.arrays.get("scale")
    return 0 if scale is None else 1 if scale.dtype == np.float32 else 2


def to_blob(packed: PackedTensor) -> bytes:
    """Header and components, each at a multiple of 64 bytes from the start."""
    params = packed.params
    header = FIXED.pack(
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        LAYOUT_IDS[packed.layout],
        VALUE_TYPE_IDS[packed.value_type],
        scale_type_id(packed),
        params.get("n", 0),
        params.get("m", 0),
        params.get("position_bits", 0),
        params.get("group_size", 0),
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
    shape = (mask.shape[0], mask.shape[1])
    total = LAYOUTS[layout].size(mask, options)
    positions = 0
    if layout == "bitmask":
        positions = shape[0] * row_bytes(shape[1])
    elif layout == "nm":
        pattern = options.pattern or find_pattern(mask)
        assert pattern is not None  # `size` would have raised
        positions = shape[0] * positions_row_bytes(*pattern, shape[1])
    elif layout == "tiled":
        pattern = options.pattern or tiled.find_pattern(mask)
        assert pattern is not None  # `size` would have raised
        positions = prod(tiled.shapes(shape, pattern, options).get("positions", (0,)))
    table = 16 if options.value_type == "i4" else 0
    scale = scale_bytes(shape, options) - table
    parts = (positions, total - positions - scale - table, scale, table)
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
    layouts = {number: name for name, number in LAYOUT_IDS.items()}
    types = {number: name for name, number in VALUE_TYPE_IDS.items()}
    if layout not in layouts or values not in types:
        raise ValueError(f"layout {layout} with value type {values} is not in the format")
    if not (1 <= rows <= MOST and 1 <= columns <= MOST and kept <= rows * columns):
        raise ValueError(f"{kept} weights kept of {rows} x {columns} are not in the format")
    _check_pattern(layouts[layout], n, m, bits)
    if layouts[layout] == "tiled" and (
        rows % tiled.TILE or columns % tiled.TILE or types[values] not in ("i8", "i4")
    ):
        raise ValueError(
            f"{rows} x {columns} weights of type {types[values]} are not in the format for tiled"
        )
    allowed = {"i8": (1, 2), "i4": (2,)}.get(types[values], (0,))
    if scale_type not in allowed or group not in ((32, 64, 128) if types[values] == "i4" else (0,)):
        raise ValueError(f"scale type {scale_type}, groups of {group}: not of the format for {types[values]}")
    params = {"n": n, "m": m} if m else {}
    params |= {"position_bits": bits} if layouts[layout] == "nm" else {}
    params |= {"group_size": group} if group else {}
    places = _places(data, total)
    found = BlobHeader(layouts[layout], types[values], scale_type, (rows, columns), params, kept, places)
    _check_sizes(found)
    return found


def from_blob(data: bytes) -> PackedTensor:
    """The packed tensor of a blob; raises `ValueError` for anything that `to_blob` does not write."""
    header = read_header(data[:HEADER_BYTES], len(data))
    shapes = _shapes(header)
    arrays: dict[str, Component] = {}
    for name in COMPONENTS:
        offset, size = header.places.get(name, (0, 0))
        if size:
            dtype, shape = shapes[name]
            found = np.frombuffer(data, dtype, size // dtype.itemsize, offset)
            arrays[name] = found.reshape(shape) if _is_sized(header, name) else found
    if "table" in arrays and (arrays["table"][0] != 0 or (arrays["table"] == -128).any()):
        raise ValueError("the i4 table needs level 0 at code 0 and no level -128")
    packed = PackedTensor(header.layout, header.value_type, header.shape, header.params, arrays, header.kept)
    if header.layout == "tiled" and (not tiled.sound(packed) or packed.nnz != tiled.kept(packed)):
        raise ValueError("positions do not ascend in their group, or are not as many as it has")
    if header.layout in ("dense", "tiled"):
        return packed
    return replace(packed, nnz=_check_positions(header, arrays))


def _is_sized(header: BlobHeader, name: str) -> bool:
    """True if the header says how many bytes a component has; of a stream of values, positions do."""
    return name != "values" or header.layout in ("dense", "tiled")


def _check_sizes(header: BlobHeader) -> None:
    shapes, (rows, columns) = _shapes(header), header.shape
    for name in COMPONENTS:
        size = header.places.get(name, (0, 0))[1]
        dtype, shape = shapes.get(name, (np.dtype(np.uint8), (0,)))
        needed = prod(shape) * dtype.itemsize
        if _is_sized(header, name) and size != needed:
            raise ValueError(
                f"the component {name} has {size} bytes, {rows} x {columns} weights need {needed}"
            )
        if size % dtype.itemsize:
            raise ValueError(f"the component {name} has {size} bytes, which is no whole number of values")


def _check_pattern(layout: str, n: int, m: int, bits: int) -> None:
    if layout == "nm":
        known = 1 <= n < m <= 32 and bits == position_bits(n, m)
    elif layout == "tiled":
        known = tiled.known_pattern(n, m) and bits == 0
    else:
        known = not (n or m or bits)
    if not known:
        raise ValueError(f"{n}:{m} with {bits} position bits is not in the format for {layout}")


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


def _shapes(header: BlobHeader) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Component → dtype and shape; the shape of a stream of values is not known yet."""
    rows, columns = header.shape
    i4 = header.value_type == "i4"
    values = np.dtype(np.uint8) if i4 else code_dtype(header.value_type)
    if header.layout == "tiled":
        return _tiled_shapes(header, values)
    shapes: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}
    if header.layout == "bitmask":
        shapes["positions"] = np.dtype(np.uint8), (rows, row_bytes(columns))
    elif header.layout == "nm":
        width = positions_row_bytes(header.params["n"], header.params["m"], columns)
        shapes["positions"] = np.dtype(np.uint8), (rows, width)
    shapes["values"] = values, (rows, -(-columns // 2) if i4 else columns)
    if header.value_type == "i8":
        shapes["scale"] = _scale_dtype(header), (rows,)
    elif i4:
        groups = group_count(columns, header.params["group_size"])
        shapes["scale"] = _scale_dtype(header), (rows, groups)
        shapes["table"] = np.dtype(np.int8), (16,)
    return shapes


def _tiled_shapes(
    header: BlobHeader, values: np.dtype[np.generic]
) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    options = PackOptions(header.value_type, header.params.get("group_size", 0))
    dtypes = {"positions": np.dtype(np.uint8), "values": values, "scale": _scale_dtype(header)}
    found = tiled.shapes(header.shape, (header.params["n"], header.params["m"]), options)
    shapes: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]
    shapes = {name: (dtypes[name], shape) for name, shape in found.items()}
    return shapes | ({"table": (np.dtype(np.int8), (16,))} if header.value_type == "i4" else {})


def _scale_dtype(header: BlobHeader) -> np.dtype[np.generic]:
    return np.dtype(np.float32 if header.scale_type == 1 else np.float16)


def _check_positions(header: BlobHeader, arrays: Mapping[str, Component]) -> int:
    """Kept weights; positions have to lie inside their row and group, and values to match their number."""
    rows, columns = header.shape
    positions = arrays["positions"]
    if header.layout == "bitmask":
        slots: NDArray[np.bool_] = np.unpackbits(
            positions.astype(np.uint8), axis=1, count=columns, bitorder="little"
        ).astype(np.bool_)
        again: Component = np.zeros(positions.shape, np.uint8)
        bits = np.packbits(slots, axis=1, bitorder="little")
        again[:, : bits.shape[1]] = bits
        counts = np.count_nonzero(slots, axis=1)
        sound = np.array_equal(again, positions)
    else:
        n, m = header.params["n"], header.params["m"]
        try:
            slots = load_positions(positions, header.shape, n, m)
        except IndexError:
            raise ValueError("a position lies outside of its group") from None
        groups = slots.reshape(rows, -1, m)
        sound = bool((np.count_nonzero(groups, axis=2) == n).all())
        sound = sound and np.array_equal(store_positions(slots, n, m, columns), positions)
        counts = np.full(rows, groups.shape[1] * n)
    if not sound:
        raise ValueError("positions lie outside of their row, or are not as many as their group has")
    expected = stream_bytes(counts, header.value_type)
    found = arrays["values"].nbytes if "values" in arrays else 0
    if found != expected:
        raise ValueError(f"the component values has {found} bytes, the mask needs {expected}")
    return int(np.count_nonzero(slots[:, :columns]))
