"""A packed tensor as one blob: a header of 128 bytes, then its components (docs/formats.md, "Blob").

For containers that store one tensor as one piece of bytes. ONNX keeps the components apart instead,
with the fields of the header as node attributes.
"""

from __future__ import annotations

import struct

import numpy as np

from losa_deploy.layouts.base import COMPONENTS, FORMAT_VERSION, PackedTensor, ValueType

MAGIC = b"LOSA"
HEADER_BYTES = 128
ALIGNMENT = 64
LAYOUT_IDS = {"dense": 0, "bitmask": 1, "nm": 2}
VALUE_TYPE_IDS: dict[ValueType, int] = {"f32": 0, "f16": 1, "i8": 2, "i4": 3}
FIXED = struct.Struct("<4sHHBBBBBBHIIQ")
"""Magic, version, header bytes, layout, value and scale type, n, m, position bits, groups, shape, kept."""


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
