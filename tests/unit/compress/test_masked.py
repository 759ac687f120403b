"""MaskedLinear: gradients, mask changes, and rank changes that leave the function alone."""

from __future__ import annotations

import torch

from losa_deploy.compress.masked import MaskedLinear


def _layer(rank: int, seed: int = 0) -> MaskedLinear:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 5, generator=draw) > 0.4
    weight = torch.where(mask, torch.randn(6, 5, generator=draw), 0.0)
    layer = MaskedLinear(weight, torch.randn(6, generator=draw), mask)
    layer.set_rank(rank, 2.0, draw)
    with torch.no_grad():
        layer.lora_b.copy_(torch.randn(6, rank, generator=draw))
    return layer


def test_forward_is_weight_plus_masked_adapter() -> None:
    layer, x = _layer(3), torch.randn(2, 4, 5)
    product = 2.0 * layer.lora_b @ layer.lora_a
    expected = x @ (layer.weight + product * layer.mask).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_custom_gradients_equal_autograd() -> None:
    layer, x = _layer(3), torch.randn(2, 4, 5, requires_grad=True)
    layer.lora_a.requires_grad_(True)
    layer.lora_b.requires_grad_(True)
    layer(x).square().sum().backward()
    got = [x.grad, layer.lora_a.grad, layer.lora_b.grad]
    a, b = layer.lora_a.detach().requires_grad_(), layer.lora_b.detach().requires_grad_()
    y = x.detach().requires_grad_()
    plain = y @ (layer.weight + layer.scale * (b @ a) * layer.mask).T + layer.bias
    plain.square().sum().backward()
    for ours, theirs in zip(got, [y.grad, a.grad, b.grad], strict=True):
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rank_changes_do_not_change_the_function() -> None:
    layer, draw = _layer(3), torch.Generator().manual_seed(1)
    before = layer.effective()
    for rank in (7, 2, 5, 1):
        layer.set_rank(rank, 1.0 + rank, draw)
        assert layer.scale == 1.0 + rank
        assert layer.rank == rank
        assert torch.allclose(layer.effective(), before, atol=1e-5)
        assert bool((layer.weight[~layer.mask] == 0).all())


def test_new_mask_prunes_weight_and_adapter() -> None:
    layer = _layer(2)
    before = layer.effective()
    mask = layer.mask & (torch.arange(5) != 2)
    layer.set_mask(mask)
    assert torch.allclose(layer.effective(), torch.where(mask, before, 0.0), atol=1e-6)


def test_new_effective_weight_is_taken_over_exactly_where_kept() -> None:
    layer = _layer(2)
    wanted = torch.randn(6, 5)
    layer.set_mask(layer.mask.clone(), wanted)
    assert torch.allclose(layer.effective(), torch.where(layer.mask, wanted, 0.0), atol=1e-5)
    assert not bool(torch.signbit(layer.weight[~layer.mask]).any()), "negative zeros outside the mask"
