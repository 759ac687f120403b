"""One pass through the blocks: prune each on the stream of the already pruned ones, measure, repair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from losa_deploy.compress.decoder import Decoder, Stream, batch_size
from losa_deploy.compress.prune import (
    InputStatistics,
    Pattern,
    Pruned,
    prune_magnitude,
    prune_sparsegpt,
    prune_wanda,
)
from losa_deploy.compress.reconstruct import reconstruct_block
from losa_deploy.compress.seeds import generator
from losa_deploy.interfaces import Progress
from losa_deploy.recipe import PruneRecipe, Recipe


@dataclass(frozen=True)
class Walk:
    """What a pass needs to know; `student` is changed, `dense` is read."""

    student: Decoder
    dense: Decoder
    masked: frozenset[str]
    recipe: Recipe
    step: int
    label: str
    progress: Progress


def walk_blocks(
    walk: Walk, tokens: Tensor, rates: NDArray[np.float64], kept: Sequence[int] | None
) -> list[float]:
    """Prune every block to its rate (or its N of every M in `kept`) and return each block's error.

    In mode `reconstruct` a block is repaired before the stream moves on, so that later masks see
    repaired activations. Errors are per block, see `block_error`.
    """
    # The stream's batches are also what reconstruction trains on, so they follow its batch size.
    batch = batch_size(tokens.shape[0], walk.recipe.adapt.batch_size)
    ours, dense = walk.student.stream(tokens, batch), walk.dense.stream(tokens, batch)
    errors: list[float] = []
    count = len(walk.student.blocks)
    for block in range(count):
        local = _needs_local_error(walk.recipe)
        reference = walk.dense.advance(block, ours).hidden if local else None
        prune_block(walk, block, ours, float(rates[block]), kept[block] if kept is not None else 0)
        dense = walk.dense.advance(block, dense)
        if walk.recipe.adapt.mode == "reconstruct":
            draw = generator(walk.recipe.seed, "reconstruct", walk.step, block)
            reconstruct_block(walk.student, block, ours, dense.hidden, walk.recipe.adapt, draw)
        ours = walk.student.advance(block, ours)
        errors.append(block_error(ours.hidden, dense.hidden if reference is None else reference))
        walk.progress(block + 1, count, walk.label)
    return errors


def _needs_local_error(recipe: Recipe) -> bool:
    return recipe.adapt.mode == "adapters" and recipe.rank.method == "error" and recipe.rank.error == "local"


def block_error(output: Tensor, dense: Tensor) -> float:
    """LoSA's L_i: mean over channels of ‖dense - output‖² / ‖dense‖² of [samples, tokens, hidden]."""
    difference = (dense - output).flatten(0, -2).square().sum(dim=0)
    scale = dense.flatten(0, -2).square().sum(dim=0).clamp_min(1e-30)
    return float((difference / scale).mean())


@torch.no_grad()
def prune_block(walk: Walk, block: int, stream: Stream, rate: float, kept: int) -> None:
    """Choose new masks for the linears of `block` from their inputs on `stream`."""
    recipe = walk.recipe
    statistics = _input_statistics(walk, block, stream)
    group = recipe.sparsity.group
    pattern = Pattern(rate, recipe.sparsity.scope)
    if group is not None:
        if kept >= group[1]:
            return
        pattern = Pattern(1.0 - kept / group[1], kept=kept, group=group[1])
    for name in walk.student.block_linears(block):
        if name in walk.masked:
            linear = walk.student.masked(name)
            weight, allowed = linear.effective(), linear.mask
            if recipe.prune.regrow:
                # Kept weights may make up for pruned ones: one that returns among them would count twice.
                weight = walk.dense.linear(name).weight + linear.adapter()
                allowed = torch.ones_like(linear.mask)
            pruned = prune_linear(weight, statistics.get(name), pattern, allowed, recipe.prune, name)
            update = weight if recipe.prune.regrow and pruned.weight is None else pruned.weight
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


def _input_statistics(walk: Walk, block: int, stream: Stream) -> dict[str, InputStatistics]:
    """Input moments of every linear of `block`; linears that read the same input share them."""
    method = walk.recipe.prune.method
    if method == "magnitude":
        return {}
    result: dict[str, InputStatistics] = {}
    handles = []
    prefix = f"{walk.student.family.blocks}.{block}."
    for group in walk.student.family.linears:
        first = walk.student.masked(prefix + group[0])
        statistics = InputStatistics(first.weight.shape[1], hessian=method == "sparsegpt")
        handles.append(first.register_forward_pre_hook(_adder(statistics)))
        result.update({prefix + name: statistics for name in group})
    walk.student.advance(block, stream)
    for handle in handles:
        handle.remove()
    return result


def _adder(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics.add(inputs[0])

    return hook
