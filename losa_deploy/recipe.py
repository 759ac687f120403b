"""The recipe: every choice of a run, frozen, validated, unknown keys refused.

A recipe is a preset (`losa_deploy/recipes/*.yaml`) overlaid with the user's YAML file, overlaid
with flags; each flag sets one dotted key. The effective recipe is saved with the output and
reproduces the run together with the seed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, field_validator, model_validator

from losa_deploy.errors import UsageError
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES
from losa_deploy.layouts.values import by_bits
from losa_deploy.phases import Part, PhaseRecipe, resolved, translate
from losa_deploy.structure import Structure, parse_structure

PRESETS = resources.files("losa_deploy") / "recipes"
"""Where the shipped presets are, one file each."""
ValueType = Annotated[str, AfterValidator(lambda name: _one_of(name, by_bits()))]
LayoutName = Annotated[str, AfterValidator(lambda name: _one_of(name, ("auto", *LAYOUTS)))]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]


def _one_of(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"should be one of {', '.join(names)}")
    return name


class SparsityRecipe(Part):
    """How much to prune, and in which pattern."""

    target: Sparsity = 0.5
    """Fraction of zeros over all pruned linears, e.g. 0.5; 0 leaves the model dense."""
    pattern: str = "unstructured"
    """`unstructured`; `pair`: one mask for two neighbouring rows; `sliding` or `sliding:STRIDE`: one kept in
    every window of 4 that moves on by 2 or STRIDE; or `N:M`: N kept of every M along the input dimension
    (2 ≤ M ≤ 32)."""
    scope: Literal["row", "columns"] = "row"
    """Unstructured and pair only: equal count per output row, or per block of columns over all rows."""
    mixed: bool = False
    """N:M only: more important blocks keep more than N of M, others fewer, N on average."""
    exclude: tuple[str, ...] = ()
    """Shell-style patterns of linears to leave dense, e.g. `*.v_proj`."""

    @property
    def structure(self) -> Structure:
        """The pattern, parsed."""
        return parse_structure(self.pattern)

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) for an N:M pattern, None for any other."""
        structure = self.structure
        return (structure.kept, structure.group) if structure.group else None

    @field_validator("target", mode="before")
    @classmethod
    def _fraction_not_percent(cls, value: object) -> object:
        number = float(value) if isinstance(value, int | float | str) and _is_number(value) else None
        if number is not None and number >= 1.0:
            raise ValueError(f"{value} is not a fraction; did you mean {number / 100:g}?")
        return value

    @model_validator(mode="before")
    @classmethod
    def _pattern_sets_target(cls, data: object) -> object:
        """N:M and sliding windows fix the sparsity, whatever target stands beside them."""
        if not isinstance(data, Mapping):
            return data
        fixed = parse_structure(str(data.get("pattern", "unstructured"))).sparsity
        return data if fixed is None else {**data, "target": fixed}


class CalibrationRecipe(Part):
    """Text the statistics are taken from."""

    source: str = "self"
    """`self` (sampled from the dense model) or a path: text file, .jsonl, or folder of them."""
    samples: Positive = 64
    sequence_length: Annotated[int, Field(ge=8)] = 256
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of `self`."""
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """`self` never takes tokens that are less likely than this times the likeliest."""
    start: Literal["text", "chat", "mixed", "random"] = "mixed"
    """What `self` continues: the start of a text, of a user's turn, both in turns, or a random token."""


class AllocationRecipe(Part):
    """Layer-wise sparsity rates (LoSA's LSR part)."""

    method: Literal["rmi", "slope", "uniform"] = "rmi"
    rule: Literal["graded", "two-level"] = "graded"
    """`two-level` is the linear program's corner solution of the paper; `graded` keeps distances."""
    delta: tuple[float, float, float] = (0.01, 0.02, 0.03)
    """Largest deviation from the mean rate for step targets up to 0.5, up to 0.6, above."""
    beta: Annotated[float, Field(gt=0.0)] = 1.0
    samples: Positive = 32
    """Calibration samples used for the mutual information of block features."""


class PruneRecipe(Part):
    """How masks are chosen."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    damping: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    block_columns: Positive = 128
    regrow: bool = False
    """True: a step may bring a pruned weight back (its dense value competes again)."""


class ScheduleRecipe(Part):
    """Dynamic sparsity: T alternations of pruning and adaptation."""

    steps: Positive = 5
    ramp: Literal["cubic", "none"] = "cubic"
    """`none`: full target in every step."""


class RankRecipe(Part):
    """Sparsity-aware ranks (LoSA's SRA part); only masked adapters use them."""

    method: Literal["error", "uniform"] = "error"
    error: Literal["local", "cumulative"] = "local"
    """Block error against the dense block on the same input, or of whole-model features."""
    start: Annotated[float, Field(ge=1)] = 6
    end: Annotated[float, Field(ge=1)] = 10
    maximum: Positive = 16
    scale: Annotated[float, Field(gt=0.0)] = 2.0
    """s in W + s·(B·A)∘M, whatever the rank (the paper's 2)."""

    @model_validator(mode="after")
    def _budget_fits(self) -> RankRecipe:
        if not self.start <= self.end <= self.maximum:
            raise ValueError(
                f"need start <= end <= maximum, found {self.start:g}, {self.end:g}, {self.maximum}"
            )
        return self


class MergeRecipe(Part):
    """The lossless merge."""

    dtype: Literal["source", "f32", "f16", "bf16"] = "source"


class ExportRecipe(Part):
    """How tensors are stored in the artifact."""

    layout: LayoutName = "auto"
    value_type: ValueType = "i4"
    group_size: Literal[32, 64, 128] = 128
    """Positions per scale for i4 values."""
    head: Literal["same", "f32", "f16", "i8", "i4"] = "same"
    """Value type of embedding and head; `same` follows the blocks (i4 blocks keep an i8 head)."""
    portable: bool = False
    """True: dense weights and standard operators only. GGUF: the default; with `packed`, both."""
    packed: bool = False
    """GGUF only. True: a file without the zeros, which our backend for llama.cpp opens."""
    bundle_runtime: bool = False
    """True: the library with the native operators is put beside the model, and its configuration names it."""

    @property
    def table_type(self) -> ValueType:
        """Value type of embedding and head, after `same` is resolved."""
        return VALUE_TYPES[self.value_type].head if self.head == "same" else self.head


class VerifyRecipe(Part):
    """Checks at the end of an export."""

    level: Literal["off", "quick", "full"] = "quick"
    prompts: Positive = 3
    tokens: Positive = 16
    text: str = "builtin"
    """Text for the perplexities: `builtin` or a path."""
    window: Annotated[int, Field(ge=16)] = 512
    max_tokens: Annotated[int, Field(ge=16)] = 4096
    minutes: Annotated[float, Field(gt=0.0)] = 10.0
    """The perplexities use as much of the text as all models read in so many minutes."""
    rival: Literal["q4_0", "none"] = "q4_0"
    """The report measures llama.cpp's quantization of the dense model beside the export."""


class Recipe(Part):
    """All choices of one run."""

    preset: str = "quick"
    seed: int = 0
    precision: Literal["auto", "f32", "bf16"] = "auto"
    """Of products while training; `auto` takes bf16 where the CPU computes it faster."""
    streams: Literal["f32", "bf16"] = "f32"
    """How hidden states of the calibration are kept between blocks; bf16 takes half of the room."""
    sparsity: SparsityRecipe = SparsityRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    allocation: AllocationRecipe = AllocationRecipe()
    prune: PruneRecipe = PruneRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    rank: RankRecipe = RankRecipe()
    phases: tuple[PhaseRecipe, ...] = ()
    """Training, in this order, in every schedule step."""
    merge: MergeRecipe = MergeRecipe()
    export: ExportRecipe = ExportRecipe()
    verify: VerifyRecipe = VerifyRecipe()

    @model_validator(mode="before")
    @classmethod
    def _plain_phases(cls, data: object) -> object:
        """Shorthand becomes phases, and each phase says its grid and group size itself."""
        if not isinstance(data, Mapping):
            return data
        whole = translate(data)
        export = whole.get("export")
        given = export if isinstance(export, Mapping) else {}
        value_type = given.get("value_type", ExportRecipe.model_fields["value_type"].default)
        group_size = given.get("group_size", ExportRecipe.model_fields["group_size"].default)
        phases = whole.get("phases", ())
        if isinstance(phases, list | tuple):
            whole["phases"] = [_with_grid(phase, str(value_type), group_size) for phase in phases]
        return whole

    def to_yaml(self) -> str:
        """The effective recipe as YAML, keys in declaration order."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with_grid(phase: object, value_type: str, group_size: object) -> object:
    """A phase, as data, with `grid: export` and the group size filled in."""
    if not isinstance(phase, Mapping):
        return phase
    grid = phase.get("grid", "none")
    if grid == "export":
        grid = resolved("export", value_type)
    changed: dict[str, object] = {**phase, "grid": grid}
    if grid == "none" and phase.get("grid") == "export" and isinstance(phase.get("train"), list | tuple):
        changed["train"] = [part for part in phase["train"] if part != "scales"]
    return changed if grid == "none" else {"group_size": group_size, **changed}


class _Loader(yaml.SafeLoader):
    """YAML without base-60 integers: there `pattern: 2:4` would silently be the number 124."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> object:
    """Parse recipe YAML (or one value of `--set`); raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def preset_names() -> tuple[str, ...]:
    """Names of the shipped presets, sorted."""
    return tuple(sorted(f.name.removesuffix(".yaml") for f in PRESETS.iterdir() if f.name.endswith(".yaml")))


def load_recipe(
    *,
    preset: str | None = None,
    path: Path | None = None,
    overrides: Iterable[tuple[str, object]] = (),
) -> Recipe:
    """Preset ← file ← overrides (dotted keys, e.g. `("sparsity.target", 0.6)`).

    Raises `UsageError` naming the key, the value found and near matches of an unknown key.
    """
    file_data = _read_yaml(path) if path else {}
    name = preset or str(file_data.get("preset", "quick"))
    if name not in preset_names():
        raise UsageError(
            f"Unknown preset {name!r}; known: {', '.join(preset_names())}.", hint="Use --preset quick."
        )
    data = _preset(name)
    _overlay(data, file_data)
    _overlaid(data, overrides)
    data["preset"] = name
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _usage_error(error, path) from None


def is_given(key: str, path: Path | None, overrides: Iterable[tuple[str, object]]) -> bool:
    """Whether the file or an override sets a dotted key, as whatever value."""
    data: object = _overlaid(_read_yaml(path) if path else {}, overrides)
    for part in key.split("."):
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _overlaid(data: dict[str, object], overrides: Iterable[tuple[str, object]]) -> dict[str, object]:
    """`data`, changed in place, with the values of dotted keys over it."""
    for key, value in overrides:
        nested: object = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        _overlay(data, nested)
    return data


def _preset(name: str) -> dict[str, object]:
    data = parse_yaml((PRESETS / f"{name}.yaml").read_text("utf-8"))
    assert isinstance(data, dict)
    return data


def _overlay(base: dict[str, object], top: Mapping[str, object]) -> None:
    for key, value in top.items():
        current = base.get(key)
        if isinstance(current, dict) and isinstance(value, Mapping):
            _overlay(current, value)
        elif isinstance(current, list) and isinstance(value, Mapping):
            _overlay_items(key, current, value)
        else:
            base[key] = value


def _overlay_items(key: str, base: list[object], top: Mapping[str, object]) -> None:
    """`phases.0.tokens=4096`: parts of a list by their number."""
    for number, value in top.items():
        if not str(number).isdecimal() or int(number) >= len(base):
            raise UsageError(
                f"Recipe key {key}.{number}: there is no such entry among {len(base)}.",
                hint="See `--print-recipe`; entries are counted from 0.",
            )
        entry = base[int(number)]
        if isinstance(entry, dict) and isinstance(value, Mapping):
            _overlay(entry, value)
        else:
            base[int(number)] = value


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        data = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(
            f"Cannot read the recipe {path}: {error.strerror}.", hint="Check --recipe."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The recipe {path} is not valid YAML: {error}.", hint="See --print-recipe."
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"The recipe {path} holds a {type(data).__name__}, expected keys and values.")
    return data


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys.extend(_known_keys(info.annotation, f"{prefix}{name}."))
    return keys


def _usage_error(error: ValidationError, path: Path | None) -> UsageError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f" in {path}" if path else ""
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _known_keys(Recipe), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See `losa-deploy compress --print-recipe`."
        return UsageError(f"Unknown recipe key {key!r}{where}.", hint=hint)
    message = str(first["msg"]).removeprefix("Value error, ")
    if not key:
        return UsageError(f"The recipe{where} cannot be used: {message}.", hint="See `--print-recipe`.")
    return UsageError(
        f"Recipe key {key!r}{where}: {message} (found {first.get('input')!r}).", hint="See `--print-recipe`."
    )


def _is_number(value: int | float | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
