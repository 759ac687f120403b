"""Phases of a recipe: shorthand, grids filled in, and what cannot be."""

from __future__ import annotations

import pytest

from losa_deploy.errors import UsageError
from losa_deploy.phases import PhaseRecipe
from losa_deploy.recipe import Recipe, load_recipe, preset_names


def test_presets_have_phases_on_the_grid_of_the_value_type() -> None:
    quick = load_recipe()
    assert [(p.where, p.grid, p.group_size) for p in quick.phases] == [
        ("blocks", "i4", 128),
    ]
    standard = load_recipe(preset="standard")
    assert [(p.where, p.grid) for p in standard.phases] == [("blocks", "none"), ("model", "i4")]
    assert quick.export.value_type == "i4"
    finer = load_recipe(overrides=[("export.group_size", 32)])
    assert [p.group_size for p in finer.phases] == [32]
    eight = load_recipe(overrides=[("export.value_type", "i8")])
    assert [p.grid for p in eight.phases] == ["i8"]
    plain = load_recipe(overrides=[("export.value_type", "f16")])
    assert [(p.grid, p.train) for p in plain.phases] == [("none", ("weights",))]
    assert all(load_recipe(preset=name).phases for name in preset_names())


def test_a_stored_recipe_is_read_as_it_was() -> None:
    recipe = load_recipe(preset="standard", overrides=[("phases.1.data", [{"source": "a.txt"}])])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", []),
        ("reconstruct", [(("weights",), "blocks", "relative")]),
        ("direct", [(("weights",), "model", "relative")]),
        ("adapters", [(("adapters",), "model", "absolute")]),
    ],
)
def test_the_old_modes_are_phases(mode: str, expected: list[object]) -> None:
    phases = load_recipe(overrides=[("adapt.mode", mode)]).phases
    assert [(p.train, p.where, p.rate) for p in phases] == expected


def test_shorthand_is_laid_over_every_phase() -> None:
    given = [("adapt.steps", 5), ("adapt.batch_size", 4), ("adapt.learning_rate", 0.5)]
    length = ("calibration.sequence_length", 32)
    phases = load_recipe(preset="standard", overrides=[*given, length]).phases
    assert [(p.tokens, p.batch_size, p.learning_rate) for p in phases] == [(5 * 4 * 32, 4, 0.5)] * 2
    assert phases[0].steps(100, 32, last=True) == 5
    loss = load_recipe(preset="standard", overrides=[("adapt.loss", "ce")]).phases[1].losses
    assert (loss.kl, loss.ce, loss.block) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("adapt.alpha", 16, "adapt.alpha is rank.scale now"),
        ("adapt.data", "x.txt", r"adapt.data is phases\[…\]\.data"),
        ("adapt.rank", 1, "adapt has no key 'rank'"),
        ("adapt.mode", "magic", "adapt.mode 'magic' is none of"),
        ("adapt.steps", "many", "adapt.steps is 'many', expected a whole number"),
        ("phases.0.train", ["adapters"], "adapters train alone and on no grid"),
        ("phases.0.train", [], "train is empty"),
        ("phases.0", {"train": ["scales"], "grid": "none"}, "scales are those of a grid"),
        ("phases.0", {"where": "model", "window": 2}, "window is of block phases"),
        ("phases.0.loss", {"kl": 1.0}, "a block has no logits"),
        ("phases.0.data", [{"source": "a.txt"}], "block phases train on the calibration"),
        ("phases.0.where", "everywhere", "phases.0.where"),
        ("phases.2.tokens", 1, "there is no such entry among 1"),
        ("phases.0.tokenz", 1, "Unknown recipe key 'phases.0.tokenz'"),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe(overrides=[(key, value)])


def test_the_length_of_a_phase_follows_its_tokens() -> None:
    phase = PhaseRecipe(tokens=1000, final_tokens=3000, batch_size=4)
    assert phase.steps(64, 32, last=False) == 8  # 1000 / 128, rounded up
    assert phase.steps(64, 32, last=True) == 24
    assert PhaseRecipe().steps(64, 32, last=True) == 8  # every sequence once
    assert PhaseRecipe(batch_size=8, tokens=64).steps(2, 32, last=True) == 1  # fewer sequences than a batch


def test_phases_on_a_grid_run_last() -> None:
    grid = PhaseRecipe(grid="i4", group_size=128)
    assert [grid.runs(last=last) for last in (False, True)] == [False, True]
    assert [PhaseRecipe().runs(last=last) for last in (False, True)] == [True, True]
