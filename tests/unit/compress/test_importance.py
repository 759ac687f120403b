"""RMI: Gram matrices instead of features, linear CKA, importance."""

from __future__ import annotations

import math

import torch

from losa_deploy.compress.importance import block_gram, block_importance, gram, linear_cka


def _cka_from_features(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear CKA by its definition on centred features: ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_cka_equals_its_definition_on_features() -> None:
    torch.manual_seed(0)
    features = [torch.randn(9, 4, 5, dtype=torch.float64) for _ in range(3)]
    features[1] = features[0] * 2 + 0.3 * features[1]
    ours = linear_cka([gram(f) for f in features])
    for i in range(3):
        for j in range(3):
            expected = _cka_from_features(features[i].flatten(1), features[j].flatten(1))
            assert math.isclose(float(ours[i, j]), expected, rel_tol=1e-9)


def test_gram_in_pieces_equals_gram_at_once() -> None:
    torch.manual_seed(1)
    wide = torch.randn(3, 70_000)
    centred = wide.double() - wide.double().mean(0)
    assert torch.allclose(gram(wide), centred @ centred.T, rtol=1e-9)


def test_cka_ignores_scale_and_rotation_but_not_content() -> None:
    torch.manual_seed(2)
    x = torch.randn(8, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    cka = linear_cka([gram(x), gram(3.0 * x @ rotation + 1.0), gram(torch.randn(8, 6).double())])
    assert math.isclose(float(cka[0, 1]), 1.0, rel_tol=1e-9)
    assert float(cka[0, 2]) < 0.9


def test_constant_features_do_not_divide_by_zero() -> None:
    cka = linear_cka([gram(torch.ones(4, 3)), gram(torch.randn(4, 3))])
    assert bool(torch.isfinite(cka).all())


def test_redundant_blocks_are_less_important() -> None:
    cka = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.1], [0.9, 0.1, 1.0]])
    importance = block_importance(cka, beta=1.0)
    # Row sums without diagonal 1.8, 1.0, 1.0 of 3.8.
    assert torch.allclose(importance, torch.exp(-torch.tensor([1.8, 1.0, 1.0]) / 3.8))
    assert float(importance[0]) < float(importance[1])


def test_an_attention_sink_does_not_decide_the_importance() -> None:
    """First tokens a hundred times larger, alike in some blocks, must not make those blocks redundant."""
    draw = torch.Generator().manual_seed(3)
    blocks = [torch.randn(10, 6, 8, generator=draw) for _ in range(4)]
    blocks[1] = blocks[0] + 0.2 * blocks[1]
    sink = 300.0 + 100.0 * torch.randn(10, 8, generator=draw)

    def importance(features: list[torch.Tensor]) -> torch.Tensor:
        return block_importance(linear_cka([block_gram(f) for f in features]), beta=1.0)

    plain = importance(blocks)
    with_sink = [f.clone() for f in blocks]
    for block in (2, 3):
        with_sink[block][:, 0] = sink
    assert torch.allclose(importance(with_sink), plain, rtol=1e-9)
    assert int(plain.argmax()) in (2, 3)
