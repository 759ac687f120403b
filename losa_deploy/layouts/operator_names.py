"""How the ONNX operators of packed tensors are called (docs/formats.md, "In ONNX"): part of the format."""

from __future__ import annotations

from losa_deploy.layouts import tiled
from losa_deploy.layouts.base import FORMAT_VERSION, PackedTensor, ValueType

DOMAIN = "ai.losa"
FORMS = {
    "Dense": "dense",
    "Bitmask": "bitmask",
    "NmBits": "nm",
    "NmCodes": "nm",
    "Tiled": "tiled",
    "TiledQuads": "tiled",
}
"""First part of an operator's name → layout; two forms of a layout differ in what their bytes mean."""
TYPES: dict[str, ValueType] = {"F32": "f32", "F16": "f16", "I8": "i8", "I4": "i4"}


def form(packed: PackedTensor) -> str:
    """The entry of `FORMS` that a tensor is stored as."""
    match packed.layout:
        case "nm":
            return "NmCodes" if packed.params["position_bits"] else "NmBits"
        case "tiled":
            return "TiledQuads" if packed.params["m"] == tiled.SHORT else "Tiled"
    return next(name for name, layout in FORMS.items() if layout == packed.layout)


def op_type(packed: PackedTensor, weights: int = 1) -> str:
    """Operator of so many weights stored alike, e.g. `BitmaskMatMulI8`, or `NmCodesMatMulI4x3` for three."""
    return f"{form(packed)}MatMul{packed.value_type.upper()}" + (f"x{weights}" if weights > 1 else "")


def parse_op_type(name: str) -> tuple[str, ValueType, int]:
    """Form, value type and number of weights of an operator name; the inverse of `op_type`."""
    found, _, rest = name.partition("MatMul")
    value_type, _, weights = rest.partition("x")
    return found, TYPES[value_type], int(weights or 1)


def attributes(packed: PackedTensor) -> dict[str, int]:
    """Node attributes; weights that share a node agree in all of them."""
    return {"format": FORMAT_VERSION, "in_features": packed.shape[1], **packed.params}
