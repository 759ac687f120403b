"""How the ONNX operators of packed tensors are called (docs/formats.md, "In ONNX"): part of the format."""

from __future__ import annotations

from losa_deploy.layouts.base import FORMAT_VERSION, LAYOUTS, Layout, PackedTensor

DOMAIN = "ai.losa"
SWIGLU = "SwiGLU"
"""Ends the name of an operator whose two weights are gate and up: Y = SiLU(X @ gate.T) * (X @ up.T)."""


def layout_of_form(form: str) -> Layout:
    """The layout that a form belongs to."""
    return next(layout for layout in LAYOUTS.values() if form in layout.forms)


def form(packed: PackedTensor) -> str:
    """The form that a tensor is stored as."""
    return LAYOUTS[packed.layout].form(packed)


def op_type(packed: PackedTensor, weights: int = 1, *, gated: bool = False) -> str:
    """Operator of so many weights stored alike, e.g. `BitmaskMatMulI8`, or `NmCodesMatMulI4x3` for three.

    `gated`: of two weights, with `SWIGLU`.
    """
    several = f"x{weights}" if weights > 1 else ""
    return f"{form(packed)}MatMul{packed.value_type.upper()}{several}{SWIGLU if gated else ''}"


def parse_op_type(name: str) -> tuple[str, str, int]:
    """Form, value type and number of weights of an operator name, gated or not."""
    found, _, rest = name.removesuffix(SWIGLU).partition("MatMul")
    value_type, _, weights = rest.partition("x")
    return found, value_type.lower(), int(weights or 1)


def attributes(packed: PackedTensor) -> dict[str, int]:
    """Node attributes; weights that share a node agree in all of them."""
    return {"format": FORMAT_VERSION, "in_features": packed.shape[1], **packed.params}
