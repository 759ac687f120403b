"""The grid: scales against a float64 search, straight-through gradients against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from losa_deploy import _native
from losa_deploy.compress.grid import LEVELS, GridKind, levels, rounded, search_scales, straight_through
from losa_deploy.compress.grid import _Rounding as Rounding
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.precision import products
from losa_deploy.model import WeightGrid

KINDS = [GridKind("i4", 32), GridKind("i3", 64), GridKind.of("i8", 128)]


def weight_of(rows: int = 6, columns: int = 150, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw) ** 3
    weight[torch.rand(rows, columns, generator=draw) < 0.5] = 0.0
    weight[:, -5:] = 0.0
    return weight


def squared_error(weight: np.ndarray, scale: float, low: int, high: int, importance: np.ndarray) -> float:
    """Of one group in float64."""
    if scale == 0:
        return float((importance * weight**2).sum())
    level = np.clip(np.rint(weight / scale), low, high)
    return float((importance * (level * scale - weight) ** 2).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value_type)
def test_scales_are_nearly_the_best_there_are(kind: GridKind) -> None:
    weight = weight_of()
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3
    scales = search_scales(weight, kind, importance)
    assert torch.equal(scales, scales.half().float())
    assert scales.shape == (6, kind.groups(150))
    low, high = LEVELS[kind.value_type]
    width, total = kind.width(150), np.zeros(3)
    for row in range(6):
        for group in range(scales.shape[1]):
            part = slice(group * width, min((group + 1) * width, 150))
            values = weight[row, part].double().numpy()
            weighing = importance[part].double().numpy()
            peak = values[np.abs(values).argmax()] / (high if kind.value_type == "i8" else low)
            dense = [squared_error(values, peak * f, low, high, weighing) for f in np.linspace(0.5, 1.1, 121)]
            found = squared_error(values, float(scales[row, group]), low, high, weighing)
            plain = squared_error(values, float(np.float16(peak)), low, high, weighing)
            assert found <= plain * (1 + 1e-6)
            total += np.array([found, min(dense), plain])
    assert total[0] <= 1.15 * total[1], "near the best of a fine search"
    assert total[0] <= 0.95 * total[2] or kind.value_type == "i8"


def test_importance_decides_which_weights_are_exact() -> None:
    weight = torch.tensor([[8.0, 1.3, 1.3, 1.3] * 8])
    first = torch.tensor([1.0, 1e-6, 1e-6, 1e-6] * 8)
    kind = GridKind("i3", 32)
    errors = []
    for importance in (first, 1.000002 - first):
        found = rounded(weight, search_scales(weight, kind, importance), kind)
        errors.append((float((found - weight)[0, 0].abs()), float((found - weight)[0, 1].abs())))
    assert errors[0][0] < 1e-2 < errors[1][0]
    assert errors[1][1] < errors[0][1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value_type)
def test_gradients_are_those_of_the_formulas(kind: GridKind) -> None:
    """d/dw = 1 inside of the levels; d/ds = level - w/s inside, the outermost level outside (LSQ)."""
    weight = weight_of().requires_grad_()
    scales = (search_scales(weight.detach(), kind) * 0.6).half().float().requires_grad_()
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    output = straight_through(weight, scales, kind)
    assert torch.equal(output, rounded(weight.detach(), scales.detach(), kind))
    output.backward(grad)
    low, high = LEVELS[kind.value_type]
    width = kind.width(150)
    w, s = weight.detach().double().numpy(), scales.detach().double().numpy()
    spread = np.repeat(s, width, axis=1)[:, :150]
    ratio = np.divide(w, spread, out=np.zeros_like(w), where=spread != 0)
    level = np.clip(np.rint(ratio), low, high)
    inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
    assert not inside.all()
    assert weight.grad is not None and scales.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), grad.numpy() * inside)
    terms = grad.double().numpy() * np.where(inside, level - ratio, level)
    padded = np.pad(terms, ((0, 0), (0, s.shape[1] * width - 150)))
    np.testing.assert_allclose(
        scales.grad.numpy(), padded.reshape(6, -1, width).sum(-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("columns", [1, 31, 150, 700])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value_type)
def test_one_pass_gives_what_the_steps_one_by_one_give(kind: GridKind, columns: int, precision: str) -> None:
    """Bit for bit but for the order of the sums, also at ties and far beyond the levels."""
    weight = weight_of(5, columns, seed=columns)
    scales = (search_scales(weight, kind) * 0.6).half().float()
    scales[0, 0] = 0.0
    first = float(scales[1, 0])
    ties = torch.tensor([0.5, -0.5, 1.5, 7.5, 8.5, -8.5, -9.0, 1e30, -1e30, 3.5])[:columns] * first
    weight[1, : len(ties)] = ties
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    with products(precision):
        w, s = weight.clone().requires_grad_(), scales.clone().requires_grad_()
        found = straight_through(w, s, kind)
        found.backward(grad.to(found.dtype))
    assert found.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    w2, s2 = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    expected = Rounding.apply(w2, s2, kind)
    expected.backward(grad.to(found.dtype).float())
    assert torch.equal(found, expected.to(found.dtype))
    assert torch.equal(w.grad, w2.grad)
    torch.testing.assert_close(s.grad, s2.grad, rtol=1e-5, atol=1e-5 * float(s2.grad.abs().max()))


def test_what_does_not_fit_is_refused() -> None:
    weight, scales = np.zeros((3, 8), np.float32), np.ones((3, 2), np.float32)
    _native.round_rows(weight, scales, 4, -8.0, 7.0, np.zeros((3, 8), np.float32))
    for wrong in (
        (weight, scales, 3, np.zeros((3, 8), np.float32)),
        (weight, scales, 0, np.zeros((3, 8), np.float32)),
        (weight, scales[:2], 4, np.zeros((3, 8), np.float32)),
        (weight, scales, 4, np.zeros((3, 7), np.float32)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            _native.round_rows(wrong[0], wrong[1], wrong[2], -8.0, 7.0, wrong[3])
    gradients = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((3, 1), np.float32)
    with pytest.raises(ValueError, match="another shape"):
        _native.round_gradient(weight, scales, 4, -8.0, 7.0, *gradients)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value_type)
def test_a_settled_layer_is_on_its_grid_and_computes_the_same(kind: GridKind) -> None:
    weight = weight_of()
    layer = MaskedLinear(weight, None, weight != 0)
    layer.put_on_grid(kind, None)
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(3))
    before = layer(x)
    layer.settle()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.effective(), layer.weight)
    assert not bool(torch.signbit(layer.weight[layer.weight == 0]).any())
    stored = WeightGrid(kind.value_type, kind.group_size, layer.scales.detach().half().numpy())
    assert np.array_equal(stored.values(layer.weight.detach().numpy()), layer.weight.detach().numpy())
    # bf16 keeps eight bits: the levels survive, and with them the exact values.
    cast = layer.weight.detach().bfloat16().float()
    assert np.array_equal(stored.values(cast.numpy()), layer.weight.detach().numpy())
    layer.leave_grid()
    assert torch.equal(layer(x), before)
    assert layer.grid is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value_type)
def test_held_levels_outlast_any_scale(kind: GridKind) -> None:
    """y = x·(level · s)ᵀ whatever s becomes; d/ds = Σ d/dw · level over the positions of the group."""
    weight = weight_of()
    layer = MaskedLinear(weight.clone(), None, weight != 0)
    layer.put_on_grid(kind, None)
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(3))
    before = layer(x)
    layer.hold_levels()
    assert torch.equal(layer(x), before), "nothing has changed yet"
    level = levels(layer.weight, layer.scales, kind).double().numpy()
    layer.scales.requires_grad_(True)
    factor = torch.rand(layer.scales.shape, generator=torch.Generator().manual_seed(4)) * 4 - 2
    layer.scales.data.mul_(factor)
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    layer(x).backward(grad)
    slope = (grad.T.double() @ x.double()).numpy() * level
    width = kind.width(150)
    padded = np.pad(slope, ((0, 0), (0, layer.scales.shape[1] * width - 150)))
    assert layer.scales.grad is not None
    np.testing.assert_allclose(
        layer.scales.grad.numpy(), padded.reshape(6, -1, width).sum(-1), rtol=1e-4, atol=1e-3
    )
    layer.scales.requires_grad_(False)
    layer.free_levels()
    spread = np.repeat(layer.scales.double().numpy(), width, axis=1)[:, :150]
    np.testing.assert_array_equal(layer.weight.double().numpy(), (level * spread).astype(np.float32))
    assert torch.equal(layer.effective(), layer.weight), "on its grid"


def test_levels_stay_in_range_and_zero_scales_give_zero() -> None:
    kind = GridKind("i3", 32)
    weight = torch.linspace(-9, 9, 64)[None]
    found = levels(weight, torch.tensor([[1.0, 0.0]]), kind)
    assert found[0, :32].min() == -4 and float(found[0, 32:].abs().max()) == 0.0
