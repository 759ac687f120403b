"""The grids of our own tables: every row is a recipe that loads, and is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_deploy.benchmarks.grid import RecipeRow, read_grid

GRIDS = sorted((Path(__file__).parents[3] / "docs" / "grids").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_row_of_a_shipped_grid_is_a_recipe(path: Path) -> None:
    rows = [row for row in read_grid(path).rows if isinstance(row, RecipeRow)]
    assert rows
    for row in rows:
        recipe = row.effective()
        assert recipe.phases, row.name
        for grid in ("i4", "i3", "i2"):
            if row.name.endswith(f" {grid}"):
                assert recipe.phases[-1].grid == grid, row.name
        if "%" in row.name:
            share = float(row.name.partition("%")[0].split()[-1])
            assert recipe.sparsity.target == share / 100, row.name


def test_the_table_of_formats_has_its_rows_in_both_budgets() -> None:
    quick, standard = (
        {row.name: row for row in read_grid(path).rows}
        for path in GRIDS
        if path.stem in ("formats-quick", "formats-standard")
    )
    assert quick.keys() == standard.keys()
    assert len([row for row in quick.values() if isinstance(row, RecipeRow)]) == 11
