"""Training phases of a recipe: what is trained, where, on what, by what, on which grid, and how long.

The sections `adapt` and the flags `--adapt`, `--loss`, `--learning-rate`, `--adapt-steps` and `--batch-size`
are shorthand: they are translated into phases before the recipe is checked, and never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Grid = Literal["none", "export", "i8", "i4", "i3", "i2"]
LEVELS: Mapping[str, tuple[int, int]] = {"i8": (-127, 127), "i4": (-8, 7), "i3": (-4, 3), "i2": (-2, 1)}
"""Grid → lowest and highest level. Not every grid has a value type: some only tell what it would be worth."""
OptimizerName = Literal["auto", "adamw", "adamw8bit"]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0.0)]
TEACHING: Mapping[str, Mapping[str, object]] = {
    "kd": {"kl": 1.0, "ce": 0.0},
    "ce": {"kl": 0.0, "ce": 1.0},
}
"""Value of the shorthand `adapt.loss` → weights of the losses of a phase through the whole model."""
MODES: Mapping[str, tuple[Mapping[str, object], ...]] = {
    "none": (),
    "reconstruct": ({"train": ["weights"], "where": "blocks"},),
    "direct": ({"train": ["weights"], "where": "model", "warmup": 0.1},),
    "adapters": ({"train": ["adapters"], "where": "model", "rate": "absolute"},),
}
"""Value of the shorthand `adapt.mode` → phases."""
SHORTHAND = ("mode", "loss", "learning_rate", "steps", "final_steps", "batch_size")
MOVED = {
    "alpha": "rank.scale",
    "data": "phases[…].data, a list of {source, share}",
    "warmup": "phases[…].warmup",
    "weight_decay": "phases[…].weight_decay",
    "clip": "phases[…].clip",
}
"""Old key of `adapt` → where it is now."""


class Part(BaseModel):
    """Base of every section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(Part):
    """One source of training text."""

    source: str = "calibration"
    """`calibration` (the tokens the statistics are taken from), or a path like `calibration.source`."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Of the sequences of the phase; the shares of a phase are scaled to a sum of 1."""


class LossRecipe(Part):
    """Weights of the losses; those that a phase cannot have must be 0."""

    block: Weight = 0.0
    """Squared error of a block's output relative to the dense one, per token, averaged over tokens."""
    kl: Weight = 0.0
    """KL from the dense model's next-token distribution."""
    ce: Weight = 0.0
    """Cross-entropy of the next token of the text."""


class PhaseRecipe(Part):
    """One training phase. Block phases run block by block after pruning, the others after the last block."""

    train: tuple[Literal["adapters", "weights", "scales", "norms"], ...] = ("weights",)
    """`weights` are the kept ones; `scales` those of the grid, learned with the weights or, without these,
    for levels that stay; `norms` are norms and biases."""
    where: Literal["blocks", "model"] = "blocks"
    """Each block against the dense block's output, or all through the whole model."""
    window: Annotated[int, Field(ge=1, le=2)] = 1
    """Of block phases. 2: a block trains together with the one before it, on the input of that one."""
    data: tuple[DataRecipe, ...] = (DataRecipe(),)
    """Sources of the text; block phases use the calibration."""
    sequence_length: Annotated[int, Field(ge=0)] = 0
    """Tokens per sequence of other text than the calibration; 0: as the calibration's."""
    loss: LossRecipe = LossRecipe()
    """All weights 0 means `block` for block phases and `kl` for the others."""
    teacher: Literal["auto", "resident", "cached"] = "auto"
    """Of `kl`. `resident`: all that the dense model says, which takes its last states of the calibration, or
    the model itself for other text; `cached`: its `top_k`, noted before training. `auto`: `cached` for other
    text where memory is short."""
    top_k: Positive = 256
    """Tokens per position that a `cached` teacher knows; all others together are one more."""
    grid: Grid = "none"
    """The values that weights may have while they train (straight-through); `export`: as the value type."""
    group_size: Annotated[int, Field(ge=0)] = 0
    """Positions per scale of an i4 or i3 grid; filled in from `export.group_size`."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens trained on, for each block in block phases; 0: every sequence once."""
    final_tokens: Annotated[int, Field(ge=0)] = 0
    """The same in the last schedule step; 0: as in the others."""
    last_step_only: bool = False
    """Run in the last schedule step only; a phase on a grid always does."""
    batch_size: Positive = 8
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.01
    rate: Literal["relative", "absolute", "probe"] = "relative"
    """`relative` to the RMS of each linear's kept weights; `probe`: also searched around it for a while."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    optimizer: OptimizerName = "auto"
    """Of phases through the model. `adamw8bit` keeps moments in eight bits, on CUDA devices; `auto` is that
    where it can be, else `adamw`. Where processes share out the weights, and for blocks: `adamw`."""
    weight_decay: Weight = 0.0
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the adapters' input."""

    @property
    def summary(self) -> str:
        """In a few words, e.g. `weights and scales by block on the grid i4`."""
        place = "by block" if self.where == "blocks" else "through the whole model"
        grid = f" on the grid {self.grid}" if self.grid != "none" else ""
        return f"{' and '.join(self.train)} {place}{grid}"

    @property
    def losses(self) -> LossRecipe:
        """The losses with the default filled in."""
        if self.loss.block or self.loss.kl or self.loss.ce:
            return self.loss
        return LossRecipe(block=1.0) if self.where == "blocks" else LossRecipe(kl=1.0)

    @property
    def on_calibration(self) -> bool:
        """Whether it trains on the calibration and on no other text."""
        return all(item.source == "calibration" for item in self.data)

    def steps(self, available: int, length: int, *, last: bool) -> int:
        """Optimizer steps for `available` sequences of `length` tokens in this or the last schedule step."""
        tokens = self.final_tokens if last and self.final_tokens else self.tokens
        batch = min(self.batch_size, available)
        return max(1, -(-(tokens or available * length) // (batch * length)))

    def runs(self, *, last: bool) -> bool:
        """Whether the phase runs in this schedule step."""
        return last or not (self.last_step_only or self.grid != "none")

    @model_validator(mode="after")
    def _possible(self) -> PhaseRecipe:
        trained = set(self.train)
        if not trained:
            raise ValueError("train is empty; name adapters, weights, scales or norms")
        if "scales" in trained and self.grid == "none":
            raise ValueError("scales are those of a grid; set grid to i8, i4, i3 or export")
        if "adapters" in trained and (trained != {"adapters"} or self.grid != "none"):
            raise ValueError("adapters train alone and on no grid; add a phase that trains weights after it")
        if self.where == "blocks" and (self.loss.kl or self.loss.ce):
            raise ValueError("a block has no logits; loss.kl and loss.ce need where: model")
        if self.where == "model" and self.loss.block:
            raise ValueError("loss.block needs where: blocks")
        if self.where == "blocks" and self.optimizer == "adamw8bit":
            raise ValueError("adamw8bit saves memory in phases through the model; leave optimizer out")
        if self.where == "model" and self.window > 1:
            raise ValueError("window is of block phases; a phase with where: model trains all blocks")
        if self.where == "blocks" and "adapters" in trained:
            raise ValueError("adapters train through the whole model; set where: model")
        if self.where == "blocks" and any(item.source != "calibration" for item in self.data):
            raise ValueError("block phases train on the calibration; name the text as calibration.source")
        return self


def translate(data: Mapping[str, object]) -> dict[str, object]:
    """Recipe data with the shorthand `adapt` turned into phases; raises `ValueError` for what moved."""
    rest = {key: value for key, value in data.items() if key != "adapt"}
    short = data.get("adapt")
    if short is None:
        return rest
    if not isinstance(short, Mapping):
        raise ValueError("adapt is shorthand with the keys " + ", ".join(SHORTHAND))
    for key in short:
        if key in MOVED:
            raise ValueError(f"adapt.{key} is {MOVED[key]} now")
        if key not in SHORTHAND:
            raise ValueError(f"adapt has no key {key!r}; it is shorthand with " + ", ".join(SHORTHAND))
    mode = short.get("mode")
    if mode is not None and mode not in MODES:
        raise ValueError(f"adapt.mode {mode!r} is none of {', '.join(MODES)}")
    found = rest.get("phases", ()) if mode is None else MODES[str(mode)]
    phases = [dict(phase) for phase in found] if isinstance(found, list | tuple) else []
    return {**rest, "phases": [_revised(phase, short, data) for phase in phases]}


def _revised(
    phase: dict[str, object], short: Mapping[str, object], data: Mapping[str, object]
) -> dict[str, object]:
    """A phase with the shorthand's keys laid over it."""
    for key in ("learning_rate", "batch_size"):
        if key in short:
            phase[key] = short[key]
    if "loss" in short and phase.get("where") == "model":
        if short["loss"] not in TEACHING:
            raise ValueError(f"adapt.loss {short['loss']!r} is none of {', '.join(TEACHING)}")
        phase["loss"] = dict(TEACHING[str(short["loss"])])
    calibration = data.get("calibration")
    length = calibration.get("sequence_length", 256) if isinstance(calibration, Mapping) else 256
    for key, into in (("steps", "tokens"), ("final_steps", "final_tokens")):
        if key in short:
            numbers = (short[key], phase.get("batch_size", 8), phase.get("sequence_length") or length)
            if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
                raise ValueError(f"adapt.{key} is {short[key]!r}, expected a whole number")
            steps, batch, tokens = (int(str(n)) for n in numbers)
            phase[into] = steps * batch * tokens
            if key == "steps" and "final_steps" not in short:
                phase.pop("final_tokens", None)
    return phase


def resolved(grid: Grid, value_type: str) -> Grid:
    """The grid a phase trains on: `export` is the value type if that has levels, else none."""
    if grid != "export":
        return grid
    return value_type if value_type in LEVELS else "none"  # type: ignore[return-value]
