"""Which pattern runs fastest on which kernels: what the module says, and that exports then store it so."""

from __future__ import annotations

import numpy as np
import pytest

from losa_deploy import _native
from losa_deploy.cli.plan import expected_mask
from losa_deploy.errors import UsageError
from losa_deploy.layouts import PackOptions, choose
from losa_deploy.recipe import SparsityRecipe
from losa_deploy.targets import TARGETS, candidates, fastest


def test_every_target_of_this_build_is_known() -> None:
    assert set(_native.targets()) <= set(TARGETS)


@pytest.mark.parametrize(
    ("target", "value_type", "sparsity", "pattern"),
    [
        ("avx2", "i4", 0.5, "sliding"),
        ("avxvnni", "i4", 0.5, "sliding"),
        ("neon", "i8", 0.5, "sliding"),
        ("avx2", "i3", 0.5, "sliding"),
        ("avx2", "i4", 0.6, "6:16"),
        ("avx2", "i4", 0.7, "5:16"),
        ("neon", "i8", 0.75, "4:16"),
        ("avx2", "i8", 0.375, "10:16"),
        ("avx2", "i3", 0.75, "1:4"),
        ("avx2", "i4", 0.53, "sliding"),
        ("avx2", "f16", 0.5, "4:8"),
        ("avx512f", "i4", 0.5, "sliding"),
        ("avx512f", "f32", 0.6, "unstructured"),
        ("avx512vnni", "i4", 0.6, "unstructured"),
        ("avx512", "f16", 0.3, "unstructured"),
        ("avx512vnni", "i3", 0.5, "unstructured"),
        ("scalar", "i4", 0.5, "unstructured"),
    ],
)
def test_the_pattern_suits_the_kernels(target: str, value_type: str, sparsity: float, pattern: str) -> None:
    assert fastest(target, value_type, 128, sparsity).pattern == pattern


@pytest.mark.parametrize(
    ("value_type", "bits", "pattern"),
    [("i4", 3.1, "sliding"), ("i4", 2.2, "4:16"), ("i8", 4.6, "6:16"), ("i3", 1.5, "1:4")],
)
def test_bits_choose_the_nearest_pattern(value_type: str, bits: float, pattern: str) -> None:
    assert fastest("avx2", value_type, 128, 0.5, bits).pattern == pattern


def test_reasons_name_the_target_and_the_cost() -> None:
    pick = fastest("avx2", "i4", 128, 0.6)
    assert pick.target == "avx2"
    assert "no instruction that expands masks" in pick.reason
    assert "0.625 of the weights zero, 3.125 bits per weight" in pick.reason
    assert fastest("avx512", "i4", 128, 0.6).target == "avx512vnni"
    assert "with one instruction" in fastest("avx512", "i3", 128, 0.5).reason


@pytest.mark.parametrize(
    ("value_type", "sparsity", "dense"),
    [
        ("i4", 0.5, "i3"),
        ("i4", 0.625, "i3"),
        ("i4", 0.75, None),
        ("i3", 0.5, None),
        ("i8", 0.5, "i4"),
        ("f16", 0.5, "i8"),
    ],
)
def test_reasons_name_dense_values_of_as_many_bits(
    value_type: str, sparsity: float, dense: str | None
) -> None:
    reason = fastest("avx2", value_type, 128, sparsity).reason
    if dense is None:
        assert "without zeros" not in reason
    else:
        assert reason.endswith(f"(--sparsity 0 --value-type {dense})")
    assert "without zeros" not in fastest("avx512vnni", value_type, 128, sparsity).reason


@pytest.mark.parametrize(
    ("target", "value_type", "sparsity", "message"),
    [
        ("sse", "i4", 0.5, "known: avx2, avxvnni"),
        ("avx2", "i4", 0.3, r"sparsity of 0\.3 in i4: there are 0\.5 \(sliding\), 0\.625 \(6:16\)"),
        ("avx2", "i3", 0.6, r"there are 0\.5 \(sliding\), 0\.75 \(1:4\)"),
    ],
)
def test_what_is_not_known_or_not_near_is_refused(
    target: str, value_type: str, sparsity: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fastest(target, value_type, 128, sparsity)


@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4", "i3"])
def test_candidates_are_stored_in_the_layouts_that_are_fast(value_type: str) -> None:
    fast = {"nm"} if value_type.startswith("f") else {"tiled", "sliding"}
    found = candidates(value_type, 128)
    assert [c.sparsity for c in found] == sorted({c.sparsity for c in found})
    for candidate in found:
        mask = expected_mask(SparsityRecipe(pattern=candidate.pattern), (32, 2048))
        assert mask.mean() == pytest.approx(1 - candidate.sparsity)
        choice = choose(mask, PackOptions(value_type))
        assert choice.layout in fast, candidate
        assert (choice.layout == "sliding") == (candidate.pattern == "sliding")
        scale = 32 / 2048 if value_type == "i8" else 0
        assert choice.bytes * 8 / mask.size == pytest.approx(candidate.bits + scale, abs=0.04)
    assert np.all(np.diff([c.bits for c in found]) <= 0)
