"""Packed layouts, one file each: where the kept weights are and how their values are stored.

`LAYOUTS[name].pack` and `.unpack` are pure NumPy functions and exact inverses on stored values.
The bytes are specified in `docs/formats.md`.
"""

from __future__ import annotations

from losa_deploy.layouts import bitmask, dense, nm, sliding, tiled
from losa_deploy.layouts.base import LAYOUTS, Layout, PackedTensor, PackOptions, Unpacked
from losa_deploy.layouts.choose import PATTERNED, Choice, choose, forced
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

__all__ = [
    "LAYOUTS",
    "PATTERNED",
    "VALUE_TYPES",
    "Choice",
    "Layout",
    "PackOptions",
    "PackedTensor",
    "Unpacked",
    "ValueType",
    "bitmask",
    "choose",
    "dense",
    "forced",
    "nm",
    "sliding",
    "tiled",
    "unpack",
]


def unpack(packed: PackedTensor) -> Unpacked:
    """Weight and mask of a packed tensor of any layout."""
    return LAYOUTS[packed.layout].unpack(packed)
