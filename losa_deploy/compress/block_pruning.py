"""Prunes the linears of one block, by the statistics of the stream that reaches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from losa_deploy.compress.decoder import Stream
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.prune import (
    InputStatistics,
    Pattern,
    Pruned,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
)
from losa_deploy.recipe import PruneRecipe

if TYPE_CHECKING:
    from losa_deploy.compress.walk import Walk


@torch.no_grad()
def prune_block(
    walk: Walk, block: int, statistics: Mapping[str, InputStatistics], rate: float, kept: int
) -> None:
    """Choose new masks for the linears of `block` from the statistics of their inputs.

    The processes of a team take turns: one prunes a linear, all have the result.
    """
    recipe = walk.recipe
    group, structure = recipe.sparsity.group, recipe.sparsity.structure
    if recipe.sparsity.target == 0.0 or (structure.stride and rate == 0.0):
        return
    pattern = Pattern(rate, recipe.sparsity.scope, stride=structure.stride, paired=structure.paired)
    if group is not None:
        if kept >= group[1]:
            return
        pattern = Pattern(1.0 - kept / group[1], kept=kept, group=group[1])
    names = [name for name in walk.student.block_linears(block) if name in walk.masked]
    for number, name in enumerate(names):
        linear = walk.student.masked(name)
        if walk.team.shares(number):
            _prune(walk, name, linear, statistics.get(name), pattern)
        else:
            linear.leave_grid()
    for number, name in enumerate(names):
        linear = walk.student.masked(name)
        walk.team.agree((linear.mask, linear.weight), number % walk.team.count)


def _prune(
    walk: Walk, name: str, linear: MaskedLinear, statistics: InputStatistics | None, pattern: Pattern
) -> None:
    recipe = walk.recipe.prune
    weight, allowed = linear.effective(), linear.mask
    if recipe.regrow:
        # Kept weights may make up for pruned ones: one that returns among them would count twice.
        weight = walk.dense.linear(name).weight + linear.adapter()
        allowed = torch.ones_like(linear.mask)
    pruned = prune_linear(weight, statistics, pattern, allowed, recipe, name)
    update = weight if recipe.regrow and pruned.weight is None else pruned.weight
    linear.set_mask(pruned.mask, update)


def prune_linear(
    weight: Tensor,
    statistics: InputStatistics | None,
    pattern: Pattern,
    allowed: Tensor,
    recipe: PruneRecipe,
    name: str,
) -> Pruned:
    """Dispatch to the recipe's method; `statistics` may be None for magnitude only."""
    if recipe.method == "magnitude":
        return prune_magnitude(weight, pattern, allowed)
    assert statistics is not None
    if recipe.method == "wanda":
        return prune_wanda(weight, statistics, pattern, allowed)
    return prune_sparsegpt(
        weight,
        statistics,
        pattern,
        allowed,
        damping=recipe.damping,
        block_columns=recipe.block_columns,
        name=name,
    )


def input_statistics(walk: Walk, block: int, stream: Stream) -> dict[str, InputStatistics]:
    """Input moments of every linear of `block`; linears that read the same input share them."""
    method = walk.recipe.prune.method if walk.recipe.sparsity.target else "wanda"
    result: dict[str, InputStatistics] = {}
    handles = []
    prefix = f"{walk.student.family.blocks}.{block}."
    for group in walk.student.family.linears:
        first = walk.student.masked(prefix + group[0])
        statistics = InputStatistics(
            first.weight.shape[1], hessian=method == "sparsegpt", device=walk.student.device
        )
        handles.append(first.register_forward_pre_hook(_adder(statistics)))
        result.update({prefix + name: statistics for name in group})
    walk.student.advance(block, stream, walk.recipe.precision)
    for handle in handles:
        handle.remove()
    for statistics in dict.fromkeys(result.values()):
        statistics.add_up(walk.team)
    return result


def _adder(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics.add(inputs[0])

    return hook
