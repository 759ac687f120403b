"""Patterns as text, their bits per weight, their checks, and how their masks are stored."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from losa_deploy.compress.patterns import select_sliding
from losa_deploy.errors import UsageError
from losa_deploy.layouts import PackOptions, choose
from losa_deploy.recipe import SparsityRecipe, load_recipe
from losa_deploy.structure import (
    Structure,
    first_slots,
    fixed_bits,
    parse_structure,
    sparsity_for_bits,
    window_starts,
)
from losa_deploy.verify.stored import check_group

TWO = Fraction(2)


@pytest.mark.parametrize(
    ("text", "structure", "sparsity"),
    [
        ("unstructured", Structure(), None),
        ("pair", Structure(paired=True), None),
        ("2:4", Structure(kept=2, group=4), 0.5),
        ("sliding", Structure(stride=TWO), 0.5),
        ("sliding:2.5", Structure(stride=Fraction(5, 2)), 0.6),
    ],
)
def test_patterns_are_read_and_fix_the_target(
    text: str, structure: Structure, sparsity: float | None
) -> None:
    assert parse_structure(text) == structure
    recipe = SparsityRecipe(pattern=text, target=0.7)
    assert recipe.target == (0.7 if sparsity is None else sparsity)
    assert recipe.group == ((2, 4) if text == "2:4" else None)


@pytest.mark.parametrize("text", ["sliding:", "sliding:1", "sliding:3.5", "sliding:2:4", "pairs", "4:2"])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"pattern '{text}'"):
        load_recipe(overrides=[("sparsity.pattern", text)])


def test_windows_move_on_by_the_stride() -> None:
    assert window_starts(8, TWO) == (-1, 1, 3, 5)
    assert window_starts(9, TWO) == (-1, 1, 3, 5, 7)
    assert window_starts(10, Fraction(5, 2)) == (-1, 1, 4, 6)
    assert first_slots(9, TWO) == (0, 0, 0, 1, 1, 2, 2, 3, 3)


@pytest.mark.parametrize(
    ("pattern", "value_type", "bits", "sparsity"),
    [
        ("unstructured", "i4", 2.725, 0.6),
        ("unstructured", "i3", 2.625, 0.5),
        ("unstructured", "i8", 5.0, 0.5),
        ("unstructured", "f16", 9.0, 0.5),
        ("pair", "i4", 3.125, 0.375),
        ("pair", "i3", 2.5, 0.375),
    ],
)
def test_bits_give_the_sparsity(pattern: str, value_type: str, bits: float, sparsity: float) -> None:
    assert sparsity_for_bits(parse_structure(pattern), bits, value_type, 128) == sparsity


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("value_type", ["i3", "i4", "i8"])
@pytest.mark.parametrize("bits", [2.0, 2.75, 3.9])
def test_a_mask_of_that_sparsity_is_stored_in_these_bits(value_type: str, bits: float, paired: bool) -> None:
    if value_type == "i3" and bits > 3:
        pytest.skip("dense takes less")
    sparsity = sparsity_for_bits(Structure(paired=paired), bits, value_type, 64)
    mask = np.zeros((16, 4096), np.bool_)
    mask[:, : round(4096 * (1 - sparsity))] = True
    if not paired:
        mask[1::2] = mask[1::2, ::-1]
    size = choose(mask, PackOptions(value_type, group_size=64)).bytes  # type: ignore[arg-type]
    assert size * 8 / mask.size == pytest.approx(bits, abs=0.04)  # row scales, table and padding


@pytest.mark.parametrize("value_type", ["i4", "i8"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:16", "5:16", "6:16", "15:16", "3:7"])
def test_fixed_bits_are_those_of_the_layout(pattern: str, value_type: str) -> None:
    structure = parse_structure(pattern)
    columns = 4096 // structure.group * structure.group
    mask = np.tile(np.arange(columns) % structure.group < structure.kept, (16, 1))
    mask[1::2] = mask[1::2, ::-1]  # no pair of rows has one mask
    choice = choose(mask, PackOptions(value_type))  # type: ignore[arg-type]
    if choice.layout != "dense":
        stored = choice.bytes * 8 / mask.size
        assert fixed_bits(structure, value_type, 128) == pytest.approx(stored, abs=0.03)


def test_bits_out_of_reach_name_the_range() -> None:
    for bits in (1.125, 4.125, 0.0, float("nan")):
        with pytest.raises(UsageError, match=r"between 1\.125 and 4\.125"):
            sparsity_for_bits(Structure(), bits, "i4", 128)
    with pytest.raises(UsageError, match=r"between 0\.5 and 8"):
        sparsity_for_bits(Structure(paired=True), 9, "i8", 128)
    for bits in (1.12500001, 4.12499999):
        load_recipe(overrides=[("sparsity.target", sparsity_for_bits(Structure(), bits, "i4", 128))])


@pytest.mark.parametrize(
    ("pattern", "bits"), [("sliding", "3.125"), ("sliding:2.5", "2.525"), ("2:4", "3.125")]
)
def test_fixed_patterns_refuse_bits_with_their_own(pattern: str, bits: str) -> None:
    with pytest.raises(UsageError, match=f"take {bits} bits per weight"):
        sparsity_for_bits(parse_structure(pattern), 3.0, "i4", 128)


def test_checks_follow_the_pattern_and_name_the_place() -> None:
    mask = np.zeros((3, 8), np.bool_)
    mask[:, [0, 2, 4, 6]] = True
    for pattern in ("unstructured", "pair", "sliding", "2:4", "1:2"):
        assert check_group("x", mask, SparsityRecipe(pattern=pattern)) == []
    mask[1] = [1, 0, 1, 1, 0, 0, 0, 1]
    assert check_group("x", mask, SparsityRecipe(pattern="sliding")) == []
    assert "1 groups with more than 2 of 4" in check_group("x", mask, SparsityRecipe(pattern="2:4"))[0]
    (pairs,) = check_group("x", mask, SparsityRecipe(pattern="pair"))
    assert "1 pairs of rows with two masks (first rows 0 and 1)" in pairs
    mask[2] = [1, 1, 1, 0, 0, 0, 0, 1]  # the slots of 0 and 1 are taken, and the next one begins at 3
    (sliding,) = check_group("x", mask, SparsityRecipe(pattern="sliding"))
    assert "x: found 1 kept positions without a slot (first at [2, 2])" in sliding


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_sliding_masks_of_stride_2_have_a_layout_and_those_of_2_of_4_another(value_type: str) -> None:
    scores = torch.rand(32, 128, generator=torch.Generator().manual_seed(0))
    options = PackOptions(value_type)  # type: ignore[arg-type]
    for stride, layout in ((TWO, "sliding"), (Fraction(5, 2), "bitmask")):
        mask = select_sliding(scores, stride, torch.ones(32, 128, dtype=torch.bool))
        assert choose(mask.numpy(), options).layout == layout
    best_of_4 = scores.view(32, -1, 4).topk(2, dim=2).indices
    strong = torch.zeros(32, 32, 4).scatter_(2, best_of_4, 1.0).view(32, 128)
    mask = select_sliding(strong, TWO, torch.ones(32, 128, dtype=torch.bool))
    choice = choose(mask.numpy(), options)
    assert (choice.layout, choice.options.pattern) == ("tiled", (2, 4))
