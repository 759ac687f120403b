"""A linear with an explicit mask and an optional masked low-rank adapter: W + s·(B·A)∘M."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losa_deploy.compress.device import CPU
from losa_deploy.compress.grid import GridKind, levels, rounded, scaled, search_scales, straight_through


class _MaskedAdapterFunction(torch.autograd.Function):
    """x ↦ x·(W + s·(BA)∘M)ᵀ in one matmul; the masked product is rebuilt in the backward pass.

    Gradients go to x, A and B only, so that no dense weight gradient outlives the call
    (the idea of LoRS, arXiv 2501.08582). In f32 whatever x is.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.dtype, x = x.dtype, x.float()  # type: ignore[attr-defined]
        ctx.save_for_backward(x, weight, mask, lora_a, lora_b)
        ctx.scale = scale  # type: ignore[attr-defined]
        with torch.autocast(x.device.type, enabled=False):
            return x @ (weight + scale * (lora_b @ lora_a) * mask).T

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, lora_a, lora_b = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        dtype: torch.dtype = ctx.dtype  # type: ignore[attr-defined]
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = grad @ (weight + scale * (lora_b @ lora_a) * mask)
            grad_product = scale * (grad.flatten(0, -2).T @ x.flatten(0, -2)) * mask
            grad_a, grad_b = lora_b.T @ grad_product, grad_product @ lora_a.T
        return grad_x.to(dtype), None, None, grad_a, grad_b, None


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear: W [out, in] f32 (zero outside M), M bool, A [rank, in], B [out, rank], s."""

    weight: Tensor
    mask: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    grid: GridKind | None = None
    """The grid that the weight is on."""
    scales: Tensor | None = None
    """Of the grid: [out, groups], f16 numbers in f32."""

    def merged(self) -> Tensor:
        """(W + s·BA) ∘ M in f32; selected, not multiplied: a product would leave negative zeros."""
        whole = self.weight
        if self.lora_a.shape[0]:
            whole = whole + self.scale * (self.lora_b @ self.lora_a)
        return torch.where(self.mask, whole, 0.0)


class MaskedLinear(nn.Module):
    """y = x·(W + s·(B·A)∘M)ᵀ + b with W zero outside M.

    `weight` [out, in] f32, `mask` [out, in] bool (True = kept), `lora_a` [rank, in],
    `lora_b` [out, rank]; rank 0 means no adapter.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("mask", mask)
        self.lora_a = nn.Parameter(weight.new_zeros(0, weight.shape[1]), requires_grad=False)
        self.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], 0), requires_grad=False)
        self.scale = 0.0
        self.dropout = 0.0
        """Of the adapter's input while it trains."""
        self.grid: GridKind | None = None
        """Where the weight is rounded to; None for a weight that may have any value."""
        self.scales = nn.Parameter(weight.new_zeros(0, 0), requires_grad=False)
        """[out, groups]: the scales of the grid."""
        self.held: Tensor | None = None
        """[out, in] int8: the weight's levels while they stay and at most its scales train."""
        self.shared_out = False
        """Whether processes share out its parameters, see `sharded`."""
        self.mask: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaskedLinear:
        """The same function with a full mask; shares the weight's storage."""
        bias = None if linear.bias is None else linear.bias.data
        return cls(linear.weight.data, bias, torch.ones_like(linear.weight, dtype=torch.bool))

    def take(self, saved: AdaptedLinear | None, device: torch.device = CPU) -> None:
        """Become what was saved, on `device`; without it a full mask around the weight that is here."""
        if saved is None:
            rows, columns = self.weight.shape
            self.mask = torch.ones_like(self.weight, dtype=torch.bool)
            self.lora_a = nn.Parameter(self.weight.new_zeros(0, columns), requires_grad=False)
            self.lora_b = nn.Parameter(self.weight.new_zeros(rows, 0), requires_grad=False)
            self.scale, self.grid = 0.0, None
            return
        self.weight = nn.Parameter(saved.weight.to(device), requires_grad=False)
        self.mask = saved.mask.to(device)
        self.lora_a = nn.Parameter(saved.lora_a.to(device), requires_grad=False)
        self.lora_b = nn.Parameter(saved.lora_b.to(device), requires_grad=False)
        self.scale, self.grid = saved.scale, saved.grid
        if saved.scales is not None:
            self.scales = nn.Parameter(saved.scales.to(device), requires_grad=False)

    def drop(self) -> None:
        """Forget the values until `take`."""
        for name in ("weight", "lora_a", "lora_b", "scales"):
            value = getattr(self, name).data.to("meta")
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self.mask = self.mask.to("meta")

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            return nn.functional.linear(x, self.on_grid(), self.bias)
        if self.dropout:
            return self._with_dropout(x)
        y: Tensor = _MaskedAdapterFunction.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.mask, self.lora_a, self.lora_b, self.scale
        )
        return y if self.bias is None else y + self.bias

    def on_grid(self) -> Tensor:
        """The weight that a layer without an adapter multiplies by; differentiable in what trains."""
        if self.grid is None:
            return self.weight
        if self.held is None:
            return straight_through(self.weight, self.scales, self.grid, native=not self.shared_out)
        return scaled(self.held, self.scales, self.grid) if self.scales.requires_grad else self.weight

    def _with_dropout(self, x: Tensor) -> Tensor:
        """Base and adapter read different inputs here, so the product takes two matmuls."""
        branch: Tensor = _MaskedAdapterFunction.apply(  # type: ignore[no-untyped-call]
            nn.functional.dropout(x, self.dropout),
            torch.zeros_like(self.weight),
            self.mask,
            self.lora_a,
            self.lora_b,
            self.scale,
        )
        return nn.functional.linear(x, self.weight, self.bias) + branch

    @torch.no_grad()
    def put_on_grid(self, kind: GridKind, importance: Tensor | None) -> None:
        """Round to a grid from now on; scales by error, columns weighed by `importance` [in]."""
        found = search_scales(self.effective(), kind, importance)
        self.grid, self.scales = kind, nn.Parameter(found, requires_grad=False)

    @torch.no_grad()
    def hold_levels(self) -> None:
        """Keep every weight at its level until `free_levels`, whatever becomes of the scales."""
        if self.grid is not None:
            self.settle()
            self.held = levels(self.weight, self.scales, self.grid).to(torch.int8)

    @torch.no_grad()
    def free_levels(self) -> None:
        """End of `hold_levels`: the weight is what its levels and scales say."""
        if self.held is not None:
            self.settle()
            self.held = None

    @torch.no_grad()
    def settle(self) -> None:
        """Make the weight what the grid rounds it to; the layer's function stays as it is."""
        if self.grid is not None:
            self.scales.copy_(self.scales.half().float())
            self.weight.copy_(torch.where(self.mask, self.effective(), 0.0))

    @torch.no_grad()
    def leave_grid(self) -> None:
        """Let the weight have any value again, starting from where it is."""
        self.settle()
        self.grid = None

    @torch.no_grad()
    def adapter(self) -> Tensor:
        """The masked adapter s·(B·A)∘M [out, in]."""
        return self.scale * (self.lora_b @ self.lora_a) * self.mask

    @torch.no_grad()
    def effective(self) -> Tensor:
        """What the layer multiplies by: W + s·(B·A)∘M [out, in], or W on its grid."""
        if self.grid is not None:
            scales = self.scales.half().float()
            if self.held is not None:
                return scaled(self.held, scales, self.grid)
            return rounded(self.weight.data, scales, self.grid)
        return self.weight.data.clone() if self.rank == 0 else self.weight + self.adapter()

    @torch.no_grad()
    def set_mask(self, mask: Tensor, effective: Tensor | None = None) -> None:
        """Change the mask; afterwards the layer multiplies by `effective`∘mask.

        Without `effective` the kept weights stay as they are. The adapter is kept and the base
        weight takes up the difference, so that pruning with a weight update loses nothing.
        """
        self.leave_grid()
        self.mask.copy_(mask)
        if effective is None:
            self.weight.masked_fill_(~self.mask, 0.0)
        else:
            base = effective if self.rank == 0 else effective - self.adapter()
            self.weight.copy_(torch.where(self.mask, base, 0.0))

    @torch.no_grad()
    def set_rank(self, rank: int, scale: float, generator: torch.Generator) -> None:
        """Resize the adapter to `rank` with the scale s, without changing the function.

        New directions are (random A row, zero B column). Directions that go are folded into the
        weight first, and B is rescaled where the scale changes.
        """
        old_a, old_b, old_scale = self.lora_a.data, self.lora_b.data, self.scale
        keep = min(rank, self.rank)
        if keep < self.rank:
            self.weight.add_(old_scale * (old_b[:, keep:] @ old_a[keep:]) * self.mask)
        scale = scale if rank else 0.0
        new_a = torch.empty(rank - keep, self.weight.shape[1])
        new_a = (
            new_a.uniform_(-1.0, 1.0, generator=generator).div_(self.weight.shape[1] ** 0.5).to(old_a.device)
        )
        kept_b = old_b[:, :keep] * (old_scale / scale if scale and old_scale else 1.0)
        self.lora_a = nn.Parameter(torch.cat([old_a[:keep], new_a]), requires_grad=False)
        self.lora_b = nn.Parameter(
            torch.cat([kept_b, old_b.new_zeros(old_b.shape[0], rank - keep)], dim=1), requires_grad=False
        )
        self.scale = scale
