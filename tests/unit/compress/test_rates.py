"""What is measured of this machine before a compression."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from losa_deploy.compress.rates import _block_step as block_step
from losa_deploy.compress.rates import measured_rates


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(8, 20), (96, 100)])
def test_every_kind_of_work_has_a_rate(hidden: int, inner: int, bf16: bool) -> None:
    rates = measured_rates(hidden, inner, bf16=bf16, seconds=0.001)
    assert all(rate > 0 for rate in astuple(rates))
    assert bf16 or rates.products == rates.plain


@pytest.mark.parametrize(
    ("hidden", "inner", "weights"),
    [
        (576, 1536, 4 * 576 * 576 + 3 * 576 * 1536),
        (4096, 11008, 4 * 1024 * 1024 + 3 * 1024 * 2752),
        (8, 20, 4 * 64 * 64 + 3 * 64 * 160),
    ],
    ids=["as it is", "a quarter of 7B", "one head"],
)
def test_gradients_of_all_linears_of_a_block_are_measured(hidden: int, inner: int, weights: int) -> None:
    count, step = block_step(hidden, inner, bf16=False, device=torch.device("cpu"))
    gradients = step()
    assert isinstance(gradients, tuple)
    assert count == 6 * 512 * weights == 6 * 512 * sum(g.numel() for g in gradients)
    assert all(bool(g.any()) for g in gradients)
