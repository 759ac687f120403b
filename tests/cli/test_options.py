"""The table of recipe flags against the recipe: every flag changes its key, and only that."""

from __future__ import annotations

import argparse
from typing import get_args

import pytest

from losa_deploy.cli.flags import byte_count
from losa_deploy.cli.options import RECIPE_OPTIONS, RecipeOption, make_recipe, revise_recipe
from losa_deploy.cli.parser import build_parser, parse
from losa_deploy.errors import UsageError
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES
from losa_deploy.phases import MODES, TEACHING
from losa_deploy.recipe import Recipe, load_recipe, preset_names

VALUES = {
    "sparsity.target": "0.6",
    "sparsity.pattern": "2:4",
    "sparsity.exclude": "*.v_proj",
    "calibration.source": "notes.txt",
    "calibration.samples": "7",
    "calibration.sequence_length": "99",
    "calibration.temperature": "0.8",
    "seed": "5",
    "schedule.steps": "9",
    "rank.start": "2",
    "rank.end": "11",
    "rank.scale": "3",
    "phases.learning_rate": "0.123",
    "phases.steps": "77",
    "phases.batch_size": "3",
    "export.group_size": "32",
    "verify.text": "notes.txt",
    "verify.window": "64",
    "verify.max_tokens": "321",
    "verify.minutes": "2.5",
}


def flatten(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def test_flags_of_phases_reach_every_phase() -> None:
    phases = recipe_of("--preset", "standard", "--learning-rate", "0.5", "--batch-size", "3").phases
    assert [(phase.learning_rate, phase.batch_size) for phase in phases] == [(0.5, 3)] * 2
    assert recipe_of("--adapt", "none").phases == ()


def recipe_of(*flags: str) -> Recipe:
    return make_recipe(parse(build_parser(), ["compress-and-export", "--format", "onnx", *flags]))


def arguments(option: RecipeOption, default: object) -> list[str]:
    if option.kind == "switch":
        return [option.flag.replace("--", "--no-", 1) if default else option.flag]
    other = [c for c in option.choices if c != default]
    return [option.flag, other[0] if other else VALUES[option.key]]


@pytest.mark.parametrize("option", RECIPE_OPTIONS, ids=lambda option: option.flag)
def test_every_flag_changes_its_own_key(option: RecipeOption) -> None:
    """Shorthand changes the phases; a value type or group size also the grid that they train on."""
    preset = ["--preset", "standard"]
    base = flatten(recipe_of(*preset).model_dump())
    key = "phases" if option.section == "phases" else option.key
    changed = flatten(recipe_of(*preset, *arguments(option, base.get(option.key))).model_dump())
    differing = {key for key in base if base[key] != changed[key]}
    follow = {"sparsity.pattern": {"sparsity.target"}, "export.value_type": {"phases"}}
    follow |= {"export.group_size": {"phases"}}
    assert key in differing
    assert differing <= {key} | follow.get(option.key, set())


@pytest.mark.parametrize("option", [o for o in RECIPE_OPTIONS if o.choices], ids=lambda option: option.flag)
def test_choices_are_those_of_the_recipe(option: RecipeOption) -> None:
    registered = {
        "phases.mode": set(MODES),
        "phases.loss": set(TEACHING),
        "export.layout": {"auto", *LAYOUTS},
        "export.value_type": set(VALUE_TYPES),
    }
    if option.key in registered:
        assert set(option.choices) == registered[option.key]
        return
    section, _, key = option.key.rpartition(".")
    owner = type(getattr(Recipe(), section)) if section else Recipe
    assert set(option.choices) == set(get_args(owner.model_fields[key].annotation))


def test_no_flag_and_no_key_is_listed_twice() -> None:
    assert (
        len({o.flag for o in RECIPE_OPTIONS}) == len({o.key for o in RECIPE_OPTIONS}) == len(RECIPE_OPTIONS)
    )


def test_set_reaches_every_key_of_the_recipe() -> None:
    for key, value in flatten(Recipe().model_dump(mode="json")).items():
        if key != "preset" and isinstance(value, int | float) and not isinstance(value, bool):
            assert flatten(recipe_of("--set", f"{key}={value}").model_dump())[key] == value


def test_set_wins_over_the_flag_and_refuses_nonsense() -> None:
    assert recipe_of("--sparsity", "0.6", "--set", "sparsity.target=0.7").sparsity.target == 0.7
    with pytest.raises(UsageError, match="KEY=VALUE"):
        recipe_of("--set", "sparsity.target")
    with pytest.raises(UsageError, match=r"sparsity\.target"):
        recipe_of("--set", "sparsity.tarket=0.7")


def test_percent_is_refused_with_the_fraction() -> None:
    with pytest.raises(UsageError, match=r"did you mean 0\.5\?"):
        recipe_of("--sparsity", "50")


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_offered(preset: str) -> None:
    assert recipe_of("--preset", preset) == load_recipe(preset=preset)


def test_a_later_stage_keeps_the_recipe_and_changes_what_it_is_told() -> None:
    stored = load_recipe(preset="faithful", overrides=[("sparsity.target", 0.7), ("export.head", "f16")])
    args = parse(build_parser(), ["export", "merged", "--format", "onnx", "--value-type", "f32"])
    revised = revise_recipe(stored, args)
    assert revised.export.value_type == "f32"
    assert revised.export.head == "f16"
    assert revised.model_copy(update={"export": stored.export}) == stored


@pytest.mark.parametrize(("text", "expected"), [("8G", 8 * 10**9), ("1.5g", 15 * 10**8), ("300M", 3 * 10**8)])
def test_memory_is_a_size(text: str, expected: int) -> None:
    assert byte_count(text) == expected


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "8 GB", "many", "infG"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected one like 8G"):
        byte_count(text)
