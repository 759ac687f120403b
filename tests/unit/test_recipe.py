"""Presets and recipe files are the same YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_deploy import recipe
from losa_deploy.recipe import load_recipe, preset_names


def test_a_preset_says_its_pattern_as_a_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In YAML 1.1 the pattern 2:4 is the number 124, counted by 60."""
    shipped = {name: (recipe.PRESETS / f"{name}.yaml").read_text("utf-8") for name in preset_names()}
    for name, text in shipped.items():
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")
    (tmp_path / "pairs.yaml").write_text("sparsity:\n  pattern: 2:4\n  scope: row\n", "utf-8")
    monkeypatch.setattr(recipe, "PRESETS", tmp_path)
    assert preset_names() == tuple(sorted([*shipped, "pairs"]))
    found = load_recipe(preset="pairs")
    assert (found.sparsity.pattern, found.sparsity.group, found.sparsity.target) == ("2:4", (2, 4), 0.5)
    (tmp_path / "own.yaml").write_text("sparsity:\n  pattern: 2:4\n  scope: row\n", "utf-8")
    assert load_recipe(path=tmp_path / "own.yaml").sparsity == found.sparsity
