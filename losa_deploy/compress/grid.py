"""The grid that kept weights are rounded to: scales chosen by error, then learned with the weights.

A weight on the grid is level · scale, with whole levels and one scale per group of positions of a row (or per
row for i8). Scales are f16 numbers, as every format stores them. While training, the forward pass sees
rounded weights and the gradient passes the rounding (straight-through, Bengio et al. 2013, arXiv 1308.3432);
scales learn by the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from losa_deploy import _native
from losa_deploy.phases import LEVELS, Grid

FACTORS = tuple(1.0 - 0.025 * i for i in range(21))
"""Scales that are tried, relative to the one at which the largest weight of a group is exact."""


@dataclass(frozen=True)
class GridKind:
    """Which levels, and how many positions share a scale (0: the whole row)."""

    value_type: Grid
    group_size: int

    @classmethod
    def of(cls, value_type: Grid, group_size: int) -> GridKind:
        """The grid of a value type; i8 has one scale per row."""
        return cls(value_type, 0 if value_type == "i8" else group_size)

    def width(self, columns: int) -> int:
        """Positions per scale in rows of `columns`."""
        return min(self.group_size or columns, columns)

    def groups(self, columns: int) -> int:
        """Scales per row."""
        return -(-columns // self.width(columns))


def spread(scales: Tensor, width: int, columns: int) -> Tensor:
    """Scales [out, groups] → one per position [out, columns]."""
    return scales.repeat_interleave(width, dim=1)[:, :columns]


def ratios(weight: Tensor, scales: Tensor, kind: GridKind) -> Tensor:
    """Every weight [out, in] as a multiple of its scale; 0 where the scale is 0."""
    # Few scales are inverted, not many weights divided: this runs in every training step.
    inverse = torch.where(scales == 0, 0.0, 1.0 / torch.where(scales == 0, 1.0, scales))
    return weight * spread(inverse, kind.width(weight.shape[1]), weight.shape[1])


def levels(weight: Tensor, scales: Tensor, kind: GridKind) -> Tensor:
    """The nearest level of every weight [out, in]; 0 where the scale is 0."""
    return ratios(weight, scales, kind).round_().clamp_(*LEVELS[kind.value_type])


def rounded(weight: Tensor, scales: Tensor, kind: GridKind) -> Tensor:
    """The weight [out, in] on the grid of `scales` [out, groups], which are f16 numbers in f32."""
    scale = spread(scales, kind.width(weight.shape[1]), weight.shape[1])
    # Level 0 times a negative scale is -0; zero is stored as +0.
    return levels(weight, scales, kind) * scale + 0.0


class _NativeRounding(torch.autograd.Function):
    """`_Rounding` in one pass over the weights each way; the result is f32, or bf16 for products in that.

    Only the weights are kept for the gradient.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weight: Tensor,
        scales: Tensor,
        kind: GridKind,
        dtype: torch.dtype,
    ) -> Tensor:
        exact = scales.half().float()
        result = torch.empty_like(weight, dtype=dtype)
        _native.round_rows(*_grid_arguments(weight, exact, kind), _numbers(result))
        ctx.save_for_backward(weight, exact)
        ctx.kind = kind  # type: ignore[attr-defined]
        return result

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, exact = ctx.saved_tensors  # type: ignore[attr-defined]
        kind: GridKind = ctx.kind  # type: ignore[attr-defined]
        of_weight, of_scales = torch.empty_like(weight), torch.empty_like(exact)
        arguments = _grid_arguments(weight, exact, kind)
        gradients = (_numbers(part) for part in (grad.contiguous(), of_weight, of_scales))
        _native.round_gradient(*arguments, *gradients)
        return of_weight, of_scales, None, None


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    """The memory of a tensor; bf16 as its bits."""
    bits = tensor.detach()
    return (bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits).numpy()


def _grid_arguments(
    weight: Tensor, scales: Tensor, kind: GridKind
) -> tuple[NDArray[np.float32], NDArray[np.float32], int, float, float]:
    low, high = LEVELS[kind.value_type]
    return _numbers(weight), _numbers(scales), kind.width(weight.shape[1]), float(low), float(high)


class _Rounding(torch.autograd.Function):
    """weight, scales ↦ the weight on the grid, with straight-through gradients; on any device."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight: Tensor, scales: Tensor, kind: GridKind
    ) -> Tensor:
        low, high = LEVELS[kind.value_type]
        width, columns = kind.width(weight.shape[1]), weight.shape[1]
        exact = scales.half().float()
        ratio = ratios(weight, exact, kind)
        nearest = ratio.round()
        level = nearest.clamp(low, high)
        inside = nearest == level
        learns = scales.requires_grad
        slope = torch.where(inside, level - ratio, level) if learns else level.new_zeros(0)
        ctx.save_for_backward(inside, slope)
        ctx.width, ctx.shape = width, scales.shape  # type: ignore[attr-defined]
        return level.mul_(spread(exact, width, columns))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        inside, slope = ctx.saved_tensors  # type: ignore[attr-defined]
        width, (rows, groups) = ctx.width, ctx.shape  # type: ignore[attr-defined]
        if not slope.numel():
            return grad * inside, None, None
        product = torch.nn.functional.pad(grad * slope, (0, groups * width - grad.shape[1]))
        return grad * inside, product.view(rows, groups, width).sum(dim=2), None


def straight_through(weight: Tensor, scales: Tensor, kind: GridKind, *, native: bool = True) -> Tensor:
    """`rounded`, differentiable in weight [out, in] and scales [out, groups].

    In bf16 where matmuls take such numbers (see `precision.products`). `native` is for memory that NumPy may
    hold on to: FSDP frees that of its parameters after each use.
    """
    result: Tensor
    if weight.device.type != "cpu" or not native:
        result = _Rounding.apply(weight, scales, kind)  # type: ignore[no-untyped-call]
        return result
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    result = _NativeRounding.apply(weight, scales, kind, dtype)  # type: ignore[no-untyped-call]
    return result


class _Scaling(torch.autograd.Function):
    """levels, scales ↦ levels · scales, without a copy of the product for the backward pass."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, level: Tensor, scales: Tensor, kind: GridKind
    ) -> Tensor:
        ctx.save_for_backward(level)
        ctx.width, ctx.shape = kind.width(level.shape[1]), scales.shape  # type: ignore[attr-defined]
        return level * spread(scales.half().float(), kind.width(level.shape[1]), level.shape[1]) + 0.0

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        (level,) = ctx.saved_tensors  # type: ignore[attr-defined]
        width, (rows, groups) = ctx.width, ctx.shape  # type: ignore[attr-defined]
        product = torch.nn.functional.pad(grad * level, (0, groups * width - grad.shape[1]))
        return None, product.view(rows, groups, width).sum(dim=2), None


def scaled(level: Tensor, scales: Tensor, kind: GridKind) -> Tensor:
    """The weight [out, in] of whole levels [out, in] int8 that stay; differentiable in scales [out, groups].

    Scales of a quantized model are few enough to train alone (Kim et al. 2023, arXiv 2305.14152).
    """
    result: Tensor = _Scaling.apply(level, scales, kind)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def search_scales(weight: Tensor, kind: GridKind, importance: Tensor | None = None) -> Tensor:
    """Scales [out, groups], f16 numbers in f32, with the least squared error of the rounded weight.

    `importance` [in] weighs the columns, e.g. by the mean square of their inputs (the diagonal of the
    layer's Hessian); None weighs them alike. Each group tries shrunken scales, then the least-squares
    scale of the levels found.
    """
    low, high = LEVELS[kind.value_type]
    rows, columns = weight.shape
    width, groups = kind.width(columns), kind.groups(columns)
    padding = (0, groups * width - columns)
    grouped = torch.nn.functional.pad(weight, padding).view(rows, groups, width)
    weighing = weight.new_ones(columns)
    if importance is not None:
        weighing = importance / importance.mean().clamp_min(1e-30)
    weighing = torch.nn.functional.pad(weighing, padding).view(1, groups, width)
    index = grouped.abs().argmax(dim=2, keepdim=True)
    peak = grouped.gather(2, index)[..., 0]
    # The largest weight takes the widest level, -8: the scale has the other sign.
    base = peak.abs() / high if kind.value_type == "i8" else peak / low
    best, scale = torch.full_like(base, float("inf")), base.half().float()
    level = torch.zeros_like(grouped)

    def consider(candidate: Tensor) -> None:
        nonlocal best, scale, level
        safe = torch.where(candidate == 0, 1.0, candidate)[..., None]
        found = (grouped / safe).round().clamp(low, high)
        error = (weighing * (found * candidate[..., None] - grouped).square()).sum(dim=2)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
        level = torch.where(better[..., None], found, level)

    for factor in FACTORS:
        consider((base * factor).half().float())
    fit = (weighing * grouped * level).sum(dim=2) / (weighing * level.square()).sum(dim=2).clamp_min(1e-30)
    consider(fit.half().float())
    return scale
