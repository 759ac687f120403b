"""What a pass does to a block, against what the same inputs give without the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from losa_deploy.compress.allocate import sparsity_ramp
from losa_deploy.compress.walk import Walk, prune_block
from losa_deploy.recipe import Recipe, load_recipe

NewWalk = Callable[[Recipe], Walk]
QUERY = "model.layers.0.self_attn.q_proj"


def tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (samples, length), generator=draw)


def query_inputs(walk: Walk, windows: torch.Tensor) -> torch.Tensor:
    """Inputs [samples·tokens, in] f64 of the first linear, by the model alone."""
    model = walk.dense.model
    hidden = model.get_submodule("model.embed_tokens")(windows)
    normed = model.get_submodule("model.layers.0.input_layernorm")(hidden)
    return normed.flatten(0, 1).double()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_regrowth_does_not_mix_dense_weights_with_compensated_ones(new_walk: NewWalk, method: str) -> None:
    """A weight that returns must not stand beside others that have made up for its absence."""
    windows, errors = tokens(16, 32), {}
    common = [("prune.method", method), ("prune.block_columns", 8), ("sparsity.target", 0.7)]
    for regrow in (False, True):
        walk = new_walk(load_recipe(overrides=[*common, ("prune.regrow", regrow)]))
        for step in range(1, 6):
            prune_block(walk, 0, walk.student.stream(windows, 8), sparsity_ramp(0.7, step, 5, "cubic"), 0)
        x, dense = query_inputs(walk, windows), walk.dense.linear(QUERY).weight.double()
        lost = x @ (walk.student.masked(QUERY).weight.double() - dense).T
        errors[regrow] = float(lost.square().sum() / (x @ dense.T).square().sum())
        assert float(walk.student.masked(QUERY).mask.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert errors[True] < 1.1 * errors[False]


def test_regrowth_keeps_what_the_adapter_has_learned(new_walk: NewWalk) -> None:
    walk = new_walk(load_recipe(overrides=[("prune.regrow", True)]))
    linear = walk.student.masked(QUERY)
    draw = torch.Generator().manual_seed(1)
    linear.set_rank(3, 4.0, draw)
    linear.lora_b.normal_(generator=draw)
    walk.student.masked(QUERY).weight.mul_(0.5)
    prune_block(walk, 0, walk.student.stream(tokens(4, 16), 4), 1e-4, 0)
    assert bool(linear.mask.all())
    assert torch.allclose(linear.effective(), walk.dense.linear(QUERY).weight + linear.adapter(), atol=1e-5)
