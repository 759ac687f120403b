"""`AdaptedModel`: base weights, bit masks and adapters of every linear, as per-block shards.

The folder is the resume state of `compress`: each finished schedule step is written beside the
old one, and `state.json`, replaced in one move, says which step counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from losa_deploy.compress.grid import GridKind
from losa_deploy.compress.masked import AdaptedLinear
from losa_deploy.compress.student import StoredBlock, Student
from losa_deploy.errors import InputError
from losa_deploy.manifest import GridRecord, Record, SourceRecord, TrainingRecord, sha256_file
from losa_deploy.model import pack_mask, unpack_mask
from losa_deploy.recipe import Recipe
from losa_deploy.text.corpus import text_digest

STATE_FILE = "state.json"
REST_FILE = "norms.safetensors"
"""Norms and biases by full name; only of a step in which a phase trains them."""
CALIBRATION_FILE = "calibration.safetensors"
SCHEMA = "losa.adapted/1"


class AdaptedState(Record):
    """The parsed `state.json`."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    fingerprint: str
    """Hash of all the weights depend on: source files, the recipe without its export, and its texts."""
    step: int
    """Finished schedule steps; the model is complete when it equals `recipe.schedule.steps`."""
    source: SourceRecord
    recipe: Recipe
    masked: tuple[str, ...]
    """Linears that are pruned; the others are excluded by the recipe."""
    calibration_sha256: str
    block_sparsity: tuple[float, ...] = ()
    block_rank: tuple[int, ...] = ()
    block_error: tuple[float, ...] = ()
    scales: dict[str, float] = Field(default_factory=dict)
    """Adapter scale s by linear."""
    grids: dict[str, GridRecord] = Field(default_factory=dict)
    """Grid by linear, where weights are on one."""
    training: tuple[TrainingRecord, ...] = ()
    """What the phases did, in their order."""
    files: dict[str, str]
    """Shard of `step`, or calibration file → sha256."""
    digest: str = ""
    """SHA-256 of this record with an empty digest."""

    @property
    def complete(self) -> bool:
        return self.step == self.recipe.schedule.steps


@dataclass(frozen=True)
class AdaptedModel:
    """The folder written by `compress`."""

    folder: Path
    state: AdaptedState

    @classmethod
    def open(cls, folder: Path) -> AdaptedModel:
        """Read `state.json`; raises `InputError` if it is missing, damaged or unfinished."""
        state = read_state(folder)
        if state is None:
            raise InputError(
                f"{folder} has no {STATE_FILE}, so it is not the output of `compress`.",
                hint="Run `losa-deploy compress` first.",
            )
        if not state.complete:
            raise InputError(
                f"{folder} holds step {state.step} of {state.recipe.schedule.steps}: "
                "compression was interrupted.",
                hint="Run the same `losa-deploy compress` command again; it resumes.",
            )
        return cls(folder, state)

    def block(self, block: int) -> Mapping[str, AdaptedLinear]:
        """The linears of one block, by full name."""
        return load_block(self.folder, self.state, block)

    def rest(self) -> Mapping[str, Tensor]:
        """Trained norms and biases by full name; empty if no phase trains them."""
        return load_rest(self.folder, self.state)


def fingerprint(source_files: Mapping[str, str], recipe: Recipe) -> str:
    """SHA-256 over the source's hashes, the recipe parts that decide the weights, and the recipe's texts.

    Raises `InputError` if a text is missing or unreadable.
    """
    kept = recipe.model_dump(mode="json", exclude={"preset", "merge", "export", "verify"})
    parts: dict[str, object] = {"source": dict(sorted(source_files.items())), "recipe": kept}
    if texts := _texts(recipe):
        parts["texts"] = text_digest(texts)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _texts(recipe: Recipe) -> list[Path]:
    """Files and folders of the user's own text that the weights depend on."""
    named = [recipe.calibration.source] if recipe.calibration.source != "self" else []
    named += [item.source for phase in recipe.phases for item in phase.data if item.source != "calibration"]
    return [Path(value) for value in dict.fromkeys(named)]


def read_state(folder: Path) -> AdaptedState | None:
    """The state of `folder`, None if there is none.

    Raises `InputError` if it, or a file that it counts on, is not as it was written.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    hint = f"Delete {folder} and compress again."
    data = path.read_bytes()
    try:
        state = AdaptedState.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{path} is damaged or of another version: {error.errors()[0]['msg']}.", hint=hint
        ) from None
    if state.digest != _digest(json.loads(data)):
        raise InputError(f"{path} changed since it was written.", hint=hint)
    for name, expected in state.files.items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != expected:
            change = "changed since it was written" if file.is_file() else "is missing"
            raise InputError(f"{file} {change}.", hint=hint)
    return state


def _digest(record: Mapping[str, object]) -> str:
    """Of what a file says, not of what this version would write: a newer one knows more keys."""
    return hashlib.sha256(json.dumps({**record, "digest": ""}, sort_keys=True).encode()).hexdigest()


def step_folder(folder: Path, step: int) -> Path:
    """Where the shards of a step are, e.g. `adapted/step-02`."""
    return folder / f"step-{step:02d}"


def save_step(folder: Path, state: AdaptedState, student: Student) -> AdaptedState:
    """Write the shards of `state.step`, then switch `state.json` to them and drop the old step."""
    from safetensors.torch import save_file

    target = step_folder(folder, state.step)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rest: dict[str, Tensor] = {}
    for block in range(len(student.blocks)):
        with student.open(block):
            save_file(block_tensors(student, block), partial / f"block-{block:05d}.safetensors")
            rest |= {name: value.data.cpu().contiguous() for name, value in student.rest(block).items()}
    rest |= {name: value.data.cpu().contiguous() for name, value in student.rest(None).items()}
    if trains_rest(state.recipe):
        save_file(rest, partial / REST_FILE)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    state = write_state(folder, state)
    shutil.rmtree(step_folder(folder, state.step - 1), ignore_errors=True)
    return state


def block_tensors(student: Student, block: int) -> dict[str, Tensor]:
    """What is stored of a block: weights, mask bits, adapters, scales of grids."""
    tensors: dict[str, Tensor] = {}
    for name in student.block_linears(block):
        linear = student.masked(name)
        tensors[f"{name}.weight"] = linear.weight.data.cpu().contiguous()
        tensors[f"{name}.mask"] = torch.from_numpy(pack_mask(linear.mask.cpu().numpy()))
        if linear.rank:
            tensors[f"{name}.lora_a"] = linear.lora_a.data.cpu().contiguous()
            tensors[f"{name}.lora_b"] = linear.lora_b.data.cpu().contiguous()
        if linear.grid is not None:
            tensors[f"{name}.scales"] = linear.scales.data.cpu().contiguous()
    return tensors


def trains_rest(recipe: Recipe) -> bool:
    """Whether a phase of the recipe trains norms and biases."""
    return any("norms" in phase.train for phase in recipe.phases)


def load_rest(folder: Path, state: AdaptedState, names: Iterable[str] | None = None) -> Mapping[str, Tensor]:
    """The norms and biases of the saved step by full name, all or some; empty if no phase trains them."""
    if not state.step or not trains_rest(state.recipe):
        return {}
    return read_tensors(step_folder(folder, state.step) / REST_FILE, names)


def grid_records(student: Student, names: Iterable[str]) -> dict[str, GridRecord]:
    """The grids of those linears that are on one."""
    kinds = {name: student.masked(name).grid for name in names}
    return {
        name: GridRecord(value_type=kind.value_type, group_size=kind.group_size)
        for name, kind in kinds.items()
        if kind is not None
    }


def write_state(folder: Path, state: AdaptedState) -> AdaptedState:
    """Replace `state.json` in one move; the state with the hashes of the files that it counts on."""
    files = [folder / CALIBRATION_FILE, *sorted(step_folder(folder, state.step).glob("*.safetensors"))]
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    state = state.model_copy(update={"files": hashes})
    record = state.model_dump(mode="json", by_alias=True)
    state = state.model_copy(update={"digest": _digest(record)})
    partial = folder / f"{STATE_FILE}.partial"
    partial.write_text(state.model_dump_json(by_alias=True, indent=1) + "\n", "utf-8")
    os.replace(partial, folder / STATE_FILE)
    return state


def stored_block(folder: Path, state: AdaptedState, student: Student, block: int) -> StoredBlock:
    """A block as the last finished step left it; nothing before the first."""
    if not state.step:
        return StoredBlock()
    rest = load_rest(folder, state, student.rest(block)) if trains_rest(state.recipe) else {}
    return StoredBlock(load_block(folder, state, block), rest)


def load_block(folder: Path, state: AdaptedState, block: int) -> dict[str, AdaptedLinear]:
    """Read one shard; raises `InputError` naming the file if it is missing or damaged."""
    path = step_folder(folder, state.step) / f"block-{block:05d}.safetensors"
    return linears_of(read_tensors(path), state.scales, state.grids)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """What a file of `compress` holds, all or some; `InputError` naming it if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in (handle.keys() if names is None else names)}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", hint=f"Delete {path.parent.parent} and compress again."
        ) from None


def linears_of(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float], grids: Mapping[str, GridRecord]
) -> dict[str, AdaptedLinear]:
    """The linears stored by `block_tensors`; adapter scales and grids by linear come from the record."""
    result: dict[str, AdaptedLinear] = {}
    for key in tensors:
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        weight = tensors[key]
        shape = (weight.shape[0], weight.shape[1])
        grid = grids.get(name)
        result[name] = AdaptedLinear(
            weight=weight,
            mask=torch.from_numpy(unpack_mask(tensors[f"{name}.mask"].numpy(), shape)),
            lora_a=tensors.get(f"{name}.lora_a", weight.new_zeros(0, shape[1])),
            lora_b=tensors.get(f"{name}.lora_b", weight.new_zeros(shape[0], 0)),
            scale=scales.get(name, 0.0),
            grid=None if grid is None else GridKind(grid.value_type, grid.group_size),
            scales=tensors.get(f"{name}.scales"),
        )
    return result
