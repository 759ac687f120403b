"""Mask selection and pruning of one linear: magnitude, Wanda, SparseGPT.

All functions take a weight [out, in] f32 and give a mask [out, in] bool, True = kept.
`allowed` is the mask before: a position outside it can never come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from losa_deploy.compress.device import CPU, wide_type
from losa_deploy.compress.patterns import BLOCK, LOOK_AHEAD, Sliding, select_pairs, select_sliding
from losa_deploy.compress.team import Team
from losa_deploy.errors import InputError


@dataclass(frozen=True)
class Pattern:
    """What a mask must look like: a rate, and where its count is kept.

    Unstructured: `rate` of zeros, per `row` or per block of `columns` (all rows together).
    N:M: `kept` of every `group` positions along the input dimension (rate is 1 - kept/group).
    Sliding windows: `stride` is not 0; see `structure.window_starts`.
    `paired`: unstructured, but the rows 2 i and 2 i + 1 have one mask.
    """

    rate: float
    scope: str = "row"
    kept: int = 0
    group: int = 0
    stride: Fraction = Fraction(0)
    paired: bool = False

    def additive(self, magnitudes: Tensor) -> Tensor:
        """Scores to add up, if the pattern adds: the squares, which are the error of pruning each weight."""
        return magnitudes.square() if self.stride or self.paired else magnitudes


@dataclass(frozen=True)
class Pruned:
    """A new mask, and the weight after the method's update (None: kept weights are unchanged)."""

    mask: Tensor
    weight: Tensor | None


class InputStatistics:
    """Second moments of a linear's input, accumulated over calibration batches.

    `squares` [in] is Σ x², `hessian` [in, in] is Σ x·xᵀ (only if asked for, and until it is factored),
    `count` the tokens.
    """

    def __init__(self, in_features: int, *, hessian: bool, device: torch.device = CPU) -> None:
        self.count = 0
        self.squares = torch.zeros(in_features, device=device)
        self.hessian = torch.zeros(in_features, in_features, device=device) if hessian else None
        self._factor: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch [..., in]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.count += flat.shape[0]
        if self.hessian is not None:
            self.hessian.addmm_(flat.T, flat)
        self.squares += flat.square().sum(dim=0)

    def add_up(self, team: Team) -> None:
        """Count what all processes have seen."""
        seen = torch.tensor(float(self.count), dtype=torch.float64)
        self.count = int(team.total(seen.to(self.squares.device, wide_type(self.squares.device))))
        team.add((self.squares, *(() if self.hessian is None else (self.hessian,))))

    def factor(self, damping: float, name: str) -> Tensor:
        """See `inverse_factor`; all linears that read this input share it, and the Hessian goes."""
        if self._factor is None:
            assert self.hessian is not None
            hessian, self.hessian = self.hessian, None
            self._factor = inverse_factor(hessian, damping, name)
        return self._factor


def select(scores: Tensor, pattern: Pattern, allowed: Tensor) -> Tensor:
    """Keep the highest `scores` in the pattern's shape; positions not `allowed` go first.

    Counts are exact: round(rate·size) zeros in every row (or over the whole block of columns).
    The last, shorter N:M group of r positions keeps min(N, r). Of sliding windows and pairs the sum of
    the scores is the largest; pairs count as one row.
    """
    if pattern.stride:
        return select_sliding(scores, pattern.stride, allowed)
    if pattern.paired:
        single = replace(pattern, paired=False)
        return select_pairs(scores, allowed, lambda summed, both: select(summed, single, both))
    ranked = scores.masked_fill(~allowed, float("-inf"))
    if pattern.group:
        return select_group(ranked, pattern.kept, pattern.group) & allowed
    if pattern.scope == "columns":
        return (
            _drop_lowest(ranked.reshape(1, -1), round(pattern.rate * ranked.numel())).view_as(ranked)
            & allowed
        )
    return _drop_lowest(ranked, round(pattern.rate * ranked.shape[1])) & allowed


def select_group(scores: Tensor, kept: int, group: int) -> Tensor:
    """N:M mask [out, in]: the `kept` highest of every `group` scores along the input dimension."""
    rows, columns = scores.shape
    padding = -columns % group
    padded = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
    groups = padded.view(rows, -1, group)
    # A stable sort makes ties (and the padding) fall the same way on every machine.
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :kept]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return mask.view(rows, -1)[:, :columns]


def _drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` lowest scores of each row."""
    order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)


def prune_magnitude(weight: Tensor, pattern: Pattern, allowed: Tensor) -> Pruned:
    """Keep the largest |w|."""
    return Pruned(select(pattern.additive(weight.abs()), pattern, allowed), None)


def prune_wanda(weight: Tensor, statistics: InputStatistics, pattern: Pattern, allowed: Tensor) -> Pruned:
    """Keep the largest |w|·√E[x²] (Sun et al. 2023, arXiv 2306.11695)."""
    norms = (statistics.squares / max(1, statistics.count)).sqrt()
    return Pruned(select(pattern.additive(weight.abs() * norms), pattern, allowed), None)


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor U of (H + λI)⁻¹ = UᵀU, λ = damping·mean(diag H), doubled until it exists.

    H is used up: there are never more than three such matrices. Raises `InputError` naming the linear if
    its activations are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise InputError(
            f"The inputs of {name} are not finite on the calibration text.",
            hint="The model or the text is damaged; try another --calibration.",
        )
    diagonal = hessian.diagonal()
    base = torch.where(diagonal == 0, 1.0, diagonal)
    amount = damping * float(base.mean())
    for attempt in range(20):
        diagonal.copy_(base + amount * 2.0**attempt)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0:
                result: Tensor = upper
                return result
    raise InputError(f"The input statistics of {name} are degenerate.", hint="Use more calibration samples.")


def prune_sparsegpt(
    weight: Tensor,
    statistics: InputStatistics,
    pattern: Pattern,
    allowed: Tensor,
    *,
    damping: float,
    block_columns: int,
    name: str,
) -> Pruned:
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): prune and compensate column by column.

    Saliency is w²/[H⁻¹]² of the current, already updated weight; the error of a pruned weight
    is spread over the columns to its right. Unstructured counts are kept per block of columns.
    Sliding windows see some columns beyond their block, as the blocks before left them.
    """
    upper = statistics.factor(damping, name)
    work = weight.clone()
    work[:, statistics.squares == 0] = 0.0
    mask = torch.zeros_like(allowed)
    columns = work.shape[1]
    windows = Sliding(pattern.stride, work.shape[0], work.shape[1], work.device) if pattern.stride else None
    width = block_columns + (-block_columns % pattern.group if pattern.group else 0)
    width = min(width, BLOCK) if windows else width
    for start in range(0, columns, width):
        end = min(start + width, columns)
        piece, factor = work[:, start:end].clone(), upper[start:end, start:end]
        if windows is not None:
            seen = slice(start, end + LOOK_AHEAD)
            saliency = (work[:, seen] / upper.diagonal()[seen]).square()
            mask[:, start:end] = windows.choose(saliency, allowed[:, seen], end - start)
        elif not pattern.group:
            saliency = (piece / factor.diagonal()).square()
            counted = _block_pattern(pattern, start, end)
            mask[:, start:end] = select(saliency, counted, allowed[:, start:end])
        errors = torch.empty_like(piece)
        for j in range(end - start):
            if pattern.group and j % pattern.group == 0:
                stop = min(j + pattern.group, end - start)
                saliency = (piece[:, j:stop] / factor.diagonal()[j:stop]).square()
                window = slice(start + j, start + stop)
                mask[:, window] = select(saliency, pattern, allowed[:, window])
            column = piece[:, j].clone()
            error = torch.where(mask[:, start + j], 0.0, column) / factor[j, j]
            piece[:, j:].addr_(error, factor[j, j:], alpha=-1.0)
            errors[:, j] = error
        work[:, start:end] = piece
        work[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1.0)
    return Pruned(mask, work * mask)


def _block_pattern(pattern: Pattern, start: int, end: int) -> Pattern:
    """Per row the counts of all column blocks must add up to round(rate·in): cumulative rounding."""
    if pattern.scope != "row":
        return pattern
    zeros = round(pattern.rate * end) - round(pattern.rate * start)
    return replace(pattern, rate=zeros / (end - start))


def kept_of_group(mask: Tensor, group: int) -> int:
    """N of an N:M mask with M = `group`: the most that any group keeps; M if nothing is pruned."""
    if bool(mask.all()):
        return group
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % group))
    return int(padded.view(mask.shape[0], -1, group).sum(dim=-1).max())
