"""A large matrix is rounded and compared some rows at a time, which changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackOptions
from losa_deploy.layouts import kept as module
from losa_deploy.manifest import TensorRecord
from losa_deploy.verify.stored import check_decoded

SHAPE = (23, 96)
FIVE_ROWS = 5 * SHAPE[1] + 7


@pytest.fixture
def weight() -> np.ndarray:
    weight: np.ndarray = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)
    return weight


@pytest.mark.parametrize("on_grid", [False, True])
@pytest.mark.parametrize("value_type", sorted(VALUE_TYPES))
@pytest.mark.parametrize("layout", ["dense", "bitmask"])
def test_packing_in_parts(
    layout: str, value_type: str, on_grid: bool, weight: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = np.random.default_rng(4).random(SHAPE) < 0.5
    columns = 3 if VALUE_TYPES[value_type].grouped else 1
    scales = np.linspace(0.01, 0.3, SHAPE[0] * columns, dtype=np.float16).reshape(SHAPE[0], columns)
    options = PackOptions(value_type, 32, scales=scales if on_grid else None, search=not on_grid)
    whole = LAYOUTS[layout].pack(weight, mask, options)
    monkeypatch.setattr(module, "TOGETHER", FIVE_ROWS)
    assert len(list(module.row_slices(*SHAPE))) == 5
    parts = LAYOUTS[layout].pack(weight, mask, options)
    assert (
        parts.sha256 == whole.sha256
        and parts.params == whole.params
        and list(parts.arrays) == list(whole.arrays)
    )


def test_comparing_in_parts(weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = weight.copy()
    decoded[13, 2] += 1.0
    decoded[21, 95] -= 2.0
    packed = LAYOUTS["dense"].pack(weight, np.ones(SHAPE, np.bool_), PackOptions("i8"))
    record = TensorRecord.of("a", packed, "")
    whole = check_decoded(record, decoded, weight, None, 32)
    monkeypatch.setattr(module, "TOGETHER", FIVE_ROWS)
    assert check_decoded(record, decoded, weight, None, 32) == whole
    assert "found 2 weights" in whole[0][0] and "[13, 2]" in whole[0][0]
    assert whole[1] == pytest.approx(2.0)


def test_nan_is_not_lost_between_parts(weight: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = weight.copy()
    decoded[2, 3] = np.nan
    packed = LAYOUTS["dense"].pack(weight, np.ones(SHAPE, np.bool_), PackOptions("i8"))
    monkeypatch.setattr(module, "TOGETHER", FIVE_ROWS)
    findings, error = check_decoded(TensorRecord.of("a", packed, ""), decoded, weight, None, 32)
    assert "found 1 weights" in findings[0] and np.isnan(error)
