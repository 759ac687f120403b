"""A grid of recipes and opponents as a YAML file describes it; one row is one model to make and measure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from losa_deploy import __version__
from losa_deploy.errors import LosaError, UsageError
from losa_deploy.recipe import Recipe, load_recipe, parse_yaml

from .gguf_peers import real_peers

HINT = "See `losa-deploy bench recipes` in docs/evaluation.md."


class Part(BaseModel):
    """Base of the parts of a grid: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RecipeRow(Part):
    """Compress, merge and export with a recipe; evaluated in the format's runtime."""

    name: str
    preset: str = "quick"
    recipe: Mapping[str, object] = {}
    """Keys over the preset, nested or dotted."""
    format: str = "none"
    """An export format; `none`: the merged folder, in the reference runtime."""

    def effective(self) -> Recipe:
        """The whole recipe; `UsageError` for what it cannot have."""
        return load_recipe(preset=self.preset, overrides=self.recipe.items())


class PeerRow(Part):
    """A GGUF that llama.cpp's quantizer makes of the dense model, or our own dense i4."""

    name: str
    peer: str
    imatrix: bool = False
    """Weigh columns by their inputs. Types that cannot do without always are."""


class DenseRow(Part):
    """The dense model itself, in the reference runtime."""

    name: str
    dense: Literal["f32"]


Row = RecipeRow | PeerRow | DenseRow


class Grid(Part):
    """A model, a text, and the rows that are compared on it."""

    model: str | None = None
    """As `--model`; none: the embedded default."""
    text: str = "builtin"
    """As `evaluate --text`."""
    window: Annotated[int, Field(ge=2)] | None = None
    text_tokens: Annotated[int, Field(ge=2)] | None = None
    tasks: tuple[str, ...] = ()
    task_rows: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    """First rows of every task."""
    rows: tuple[Row, ...] = ()


def read_grid(path: Path) -> Grid:
    """Parse and check a grid file; paths in it are relative to it. `UsageError` names row and key."""
    try:
        data = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read the grid {path}: {error.strerror}.", hint=HINT) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The grid {path} is not valid YAML: {error}.", hint=HINT) from None
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or not data["rows"]:
        raise UsageError(f"The grid {path} has no list `rows`, which says what is compared.", hint=HINT)
    rows = [parse_row(entry, f"{path}, row {number}") for number, entry in enumerate(data["rows"], start=1)]
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"The grid {path} has two rows called {twice!r}.", hint="Give each its own name.")
    head = {key: value for key, value in data.items() if key != "rows"}
    if isinstance(head.get("tasks"), str):
        head["tasks"] = [name.strip() for name in head["tasks"].split(",")]
    try:
        grid = Grid.model_validate({**head, "rows": rows})
    except ValidationError as error:
        raise _refused(error, str(path)) from None
    if bool(grid.tasks) != (grid.task_rows is not None):
        raise UsageError(f"The grid {path} needs both `tasks` and `task_rows`, or none.", hint=HINT)
    return _resolved(grid, path.parent)


def parse_row(entry: object, where: str) -> Row:
    """One row; `UsageError` that begins with `where` if it cannot be used."""
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {entry!r}, expected keys and values.", hint=HINT)
    kind: type[Row] = PeerRow if "peer" in entry else DenseRow if "dense" in entry else RecipeRow
    try:
        row = kind.model_validate(dict(entry))
    except ValidationError as error:
        raise _refused(error, where) from None
    if isinstance(row, PeerRow) and row.peer not in real_peers():
        raise UsageError(f"{where} has the peer {row.peer!r}; known: {', '.join(real_peers())}.", hint=HINT)
    if isinstance(row, RecipeRow):
        try:
            row.effective()
        except LosaError as error:
            raise UsageError(f"{where} ({row.name}): {error.message}", hint=error.hint) from None
    return row


def _refused(error: ValidationError, where: str) -> UsageError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return UsageError(f"{where}: {key}: {first['msg']} (found {first.get('input')!r}).", hint=HINT)


def _resolved(grid: Grid, folder: Path) -> Grid:
    """Relative paths of text, rows of tasks and model, where there is such a file beside the grid."""

    def place(name: str | None) -> str | None:
        beside = folder / name if name else None
        return str(beside) if beside is not None and beside.exists() else name

    changes = {"model": place(grid.model), "task_rows": place(grid.task_rows)}
    if grid.text != "builtin":
        changes["text"] = place(grid.text)
    return grid.model_copy(update=changes)


def row_key(row: Row, grid: Grid, model: Mapping[str, str], text_hash: str, tasks_hash: str) -> str:
    """Name of a row's result: a hash of all that decides it, and of this program's version.

    `model` is file name → sha256 of the dense source.
    """
    measured = grid.model_dump(mode="json", exclude={"model", "text", "task_rows", "rows"})
    what: dict[str, object] = row.model_dump(mode="json")
    if isinstance(row, RecipeRow):
        what["recipe"] = row.effective().model_dump(mode="json")
    spec = [what, measured, sorted(model.items()), text_hash, tasks_hash, __version__]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]


def number_of(record: Mapping[str, object], *keys: str) -> float | None:
    """A number at `keys` of a nested record, None where there is none."""
    found: object = record
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) else None
