"""Sparsity rates and adapter ranks per block, each with its total met exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts import tiled
from losa_deploy.recipe import SparsityRecipe

Floats = NDArray[np.float64]
MOST_SUMS = 1 << 18
"""Sums that `mixed_kept` tells apart: megabytes, and seconds at most. Real models need some thousand."""


def sparsity_ramp(target: float, step: int, steps: int, ramp: str, *, at_once: bool = False) -> float:
    """Mean sparsity after `step` of `steps`: S - S·(1 - t/T)³; with ramp `none` always S.

    S=0.7, T=5 gives 0.342, 0.549, 0.655, 0.694, 0.700. A pattern that can only be reached `at_once` waits
    for the last step of a ramp.
    """
    if ramp == "none":
        return target
    if at_once and step < steps:
        return 0.0
    return target - target * (1.0 - step / steps) ** 3


def rank_ramp(start: float, end: float, step: int, steps: int) -> float:
    """Mean rank in `step` (1-based): linear from `start` to `end`; `end` if there is one step."""
    if steps == 1:
        return end
    return start + (end - start) * (step - 1) / (steps - 1)


def deviation_limit(target: float, delta: Sequence[float]) -> float:
    """δ for a step target: delta[0] up to 0.5, delta[1] up to 0.6, delta[2] above."""
    chosen = delta[0] if target <= 0.5 else delta[1] if target <= 0.6 else delta[2]
    return min(chosen, target, 1.0 - target)


def graded_deviation(importance: Floats) -> Floats:
    """Deviations in [-1, 1]: the more important, the lower, distances kept."""
    centred = importance.mean() - importance
    largest = np.abs(centred).max()
    # Importances that agree to rounding say nothing; dividing by their spread would be noise.
    return centred / largest if largest > 1e-12 else np.zeros_like(centred)


def two_level_deviation(importance: Floats) -> Floats:
    """Corner solution of min Σ s_i·importance_i on the box: the less important half at +1.

    With an odd number of blocks the middle one stays at 0 (this is what the paper's
    linear program gives whatever β is).
    """
    order = np.argsort(importance, kind="stable")
    half = len(order) // 2
    deviation = np.zeros(len(order))
    deviation[order[:half]] = 1.0
    deviation[order[len(order) - half :]] = -1.0
    return deviation


def slope_deviation(blocks: int) -> Floats:
    """Deviations rising linearly with depth from -1 to 1 (ATP, arXiv 2502.14770)."""
    return np.linspace(-1.0, 1.0, blocks) if blocks > 1 else np.zeros(1)


def allocate_rates(target: float, deviation: Floats, limit: float, weights: Floats, floor: Floats) -> Floats:
    """Rates s_i = target + limit·deviation_i + λ within [max(target - limit, floor_i), …].

    λ makes the `weights`-weighted mean equal `target` to 1e-12. `floor` is the sparsity a block
    already has: without regrowth a rate below it cannot be met, so other blocks give way.
    The upper bound is raised where a floor lies above it.
    """
    low = np.maximum(target - limit, floor)
    high = np.maximum(target + limit, low)
    share = weights / weights.sum()
    if float(share @ low) >= target:
        return low
    if float(share @ high) <= target:
        return high
    below, above = -1.0, 1.0
    wanted = target + limit * deviation
    for _ in range(200):
        middle = (below + above) / 2
        if float(share @ np.clip(wanted + middle, low, high)) < target:
            below = middle
        else:
            above = middle
    rates = np.clip(wanted + above, low, high)
    free = (rates > low) & (rates < high)
    if free.any():
        rates[free] += (target - float(share @ rates)) / float(share[free].sum())
    return rates


def largest_remainder(wanted: Floats, total: int, low: int, high: int) -> NDArray[np.int64]:
    """Integers near `wanted` in [low, high] that sum to `total` exactly (clamped to what fits).

    Rounds down, then hands out what is missing by largest remainder (ties: lower index first);
    wanted (2.6, 2.6, 0.8), total 6 gives (3, 2, 1).
    """
    total = min(max(total, low * len(wanted)), high * len(wanted))
    result = np.clip(np.floor(wanted), low, high).astype(np.int64)
    while (missing := total - int(result.sum())) != 0:
        sign = 1 if missing > 0 else -1
        open_ = result < high if sign > 0 else result > low
        gain = np.where(open_, sign * (wanted - result), -np.inf)
        for index in np.argsort(-gain, kind="stable")[: min(abs(missing), int(open_.sum()))]:
            result[index] += sign
    return result


def allocate_ranks(errors: Floats, mean_rank: float, maximum: int) -> NDArray[np.int64]:
    """Ranks r_i ≈ L_i/mean(L)·Ω in [1, maximum] with Σ r_i = round(blocks·Ω) (LoSA eq. 7).

    Capped blocks pass their surplus on in proportion, so the budget is met.
    """
    blocks = len(errors)
    safe = np.where(np.isfinite(errors) & (errors > 0), errors, 0.0)
    if safe.sum() == 0:
        safe = np.ones(blocks)
    budget = min(max(round(blocks * mean_rank), blocks), blocks * maximum)
    wanted = safe / safe.sum() * budget
    for _ in range(blocks):
        clipped = np.clip(wanted, 1, maximum)
        free = (wanted > 1) & (wanted < maximum)
        rest = budget - float(clipped[~free].sum())
        if not free.any() or np.isclose(float(wanted[free].sum()), rest):
            wanted = clipped
            break
        wanted = np.where(free, wanted * rest / float(wanted[free].sum()), clipped)
    return largest_remainder(wanted, budget, 1, maximum)


def kept_per_block(
    rates: Floats,
    target: float,
    recipe: SparsityRecipe,
    sizes: Floats,
    most: Sequence[int],
) -> list[int]:
    """N of every M for each block at this step's mean rate: all equal, or mixed around it.

    `sizes` are the prunable weights of the blocks, `most` the N that each has now and cannot exceed.
    """
    assert recipe.group is not None
    n, m = recipe.group
    # On the ramp, before the target is reached, N is rounded up: nothing is pruned too early.
    mean_kept = max(n, int(np.ceil(m * (1.0 - target) - 1e-9)))
    result = [min(mean_kept, m)] * len(rates)
    if mean_kept >= m or not recipe.mixed:
        return result
    # Tiles store pairs of slots: an odd N of 16 takes the bytes of the next even one.
    unit = 2 if m == tiled.WIDE and mean_kept % 2 == 0 else 1
    # Wholly excluded blocks keep everything anyway: they neither count nor give way.
    counted: list[int] = np.flatnonzero(sizes).tolist()
    spread = rates[counted] - np.average(rates[counted], weights=sizes[counted])
    largest = float(np.abs(spread).max())
    # Rates often differ by less than one N; the blocks furthest apart then still get a neighbouring N.
    stretch = max(float(m), unit / largest) if largest > 1e-9 else 0.0
    levels = [tuple(range(unit, min(most[b], m - unit) + 1, unit)) or (most[b],) for b in counted]
    kept = mixed_kept(mean_kept - spread * stretch, levels, sizes[counted], mean_kept)
    for block, count in zip(counted, kept, strict=True):
        result[block] = int(count)
    return result


def mixed_kept(
    wanted: Floats, levels: Sequence[Sequence[int]], sizes: Floats, mean: float
) -> NDArray[np.int64]:
    """N per block for mixed N:M: one of the block's `levels`, near its `wanted`.

    The mean over `sizes` (weights per block, > 0) is as near `mean` as the levels allow; among such
    choices the sum of sizes·(N - wanted)² is least. Levels of a block rise by one step that is common to all.
    """
    step = min((b - a for block in levels for a, b in itertools.pairwise(block)), default=1)
    units = _common_units(sizes, max(map(len, levels)))
    tops = [(len(block) - 1) * unit for block, unit in zip(levels, units, strict=True)]
    # cost[k]: the least cost of the blocks so far if they are k units·steps above their lowest levels.
    cost = np.full(sum(tops) + 1, np.inf)
    cost[0] = 0.0
    chosen = np.zeros((len(levels), len(cost)), np.int8)
    for i, (block, unit) in enumerate(zip(levels, units, strict=True)):
        best = np.full_like(cost, np.inf)
        for j, level in enumerate(block):
            shifted = cost[: len(cost) - j * unit] + float(sizes[i]) * (level - float(wanted[i])) ** 2
            better = shifted < best[j * unit :]
            best[j * unit :][better] = shifted[better]
            chosen[i, j * unit :][better] = j
        cost = best
    lowest = sum(unit * block[0] for block, unit in zip(levels, units, strict=True))
    distance = np.abs(np.arange(len(cost)) - (mean * sum(units) - lowest) / step)
    # Of two sums equally near, the one that keeps more: the last.
    k = len(cost) - 1 - int(np.argmin(np.where(np.isfinite(cost), distance, np.inf)[::-1]))
    result = np.zeros(len(levels), np.int64)
    for i in reversed(range(len(levels))):
        j = int(chosen[i, k])
        result[i] = levels[i][j]
        k -= j * units[i]
    return result


def _common_units(sizes: Floats, levels: int) -> list[int]:
    """Sizes in their greatest common divisor, or rounded where that would make sums beyond `MOST_SUMS`."""
    whole = [round(float(size)) for size in sizes]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor * levels > MOST_SUMS:
        return [max(1, round(size * MOST_SUMS / (sum(whole) * levels))) for size in whole]
    return [size // divisor for size in whole]
