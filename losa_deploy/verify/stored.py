"""Checks on stored bytes: files against their hashes, zeros against masks, values against the format.

Each check returns findings, one line per failure, naming the culprit, what was found and what was
expected; no finding means the check passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts import VALUE_TYPES
from losa_deploy.layouts.kept import row_slices
from losa_deploy.manifest import Manifest, TensorRecord, sha256_file
from losa_deploy.model import SparseModel, WeightGrid
from losa_deploy.recipe import SparsityRecipe
from losa_deploy.structure import WINDOW, first_slots, window_starts

if TYPE_CHECKING:
    import torch

WEIGHT_SUFFIXES = (".safetensors", ".bin")
"""How the names of the weight files of a Hugging Face folder end."""


def check_files(folder: Path, manifest: Manifest, suffixes: Sequence[str] = ()) -> list[str]:
    """Every file of the manifest is there with its hash; no weight file is there without one.

    `suffixes` of names of weight files are those that formats have besides the usual ones.
    """
    findings = []
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            findings.append(f"{name}: file missing, expected sha256 {expected[:12]}…")
        elif (found := sha256_file(path)) != expected:
            findings.append(f"{name}: found sha256 {found[:12]}…, expected {expected[:12]}…")
    if not manifest.files:
        findings.append("losa.json: found no file hashes, expected one per file")
    present = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    for name in present:
        if name.endswith((*WEIGHT_SUFFIXES, *suffixes)) and name not in manifest.files:
            findings.append(f"{name}: found a weight file that losa.json does not list, expected none")
    return findings


def check_side_files(folder: Path) -> list[str]:
    """A model folder needs its config and something a tokenizer can be read from."""
    findings = []
    if not (folder / "config.json").is_file():
        findings.append("config.json: file missing")
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        findings.append(f"tokenizer: found none of {', '.join(names)}, expected one")
    return findings


def check_finite(name: str, tensor: torch.Tensor) -> list[str]:
    """No NaN, no infinity."""
    import torch

    wrong = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
    return [f"{name}: found {wrong} values that are NaN or infinite, expected none"] if wrong else []


def check_support(name: str, tensor: torch.Tensor, mask: NDArray[np.bool_]) -> list[str]:
    """Positions outside the mask hold zero bits (so -0.0 is wrong too)."""
    import torch

    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(words).numpy()
    wrong = np.argwhere((bits != 0) & ~mask)
    if not len(wrong):
        return []
    row, column = map(int, wrong[0])
    first = f"first at [{row}, {column}]: {float(tensor[row, column]):g}"
    return [f"{name}: found {len(wrong)} non-zero weights outside the mask ({first}), expected zero bits"]


def check_pattern(name: str, mask: NDArray[np.bool_], group: tuple[int, int]) -> list[str]:
    """At most N kept in every M neighbours of a row; a shorter last group may keep N as well."""
    keep, size = group
    rows, columns = mask.shape
    padded = np.pad(mask, ((0, 0), (0, -columns % size)))
    counts = padded.reshape(rows, -1, size).sum(-1)
    wrong = np.argwhere(counts > keep)
    if not len(wrong):
        return []
    row, index = map(int, wrong[0])
    found = f"{len(wrong)} groups with more than {keep} of {size} kept"
    first = f"first in row {row} at column {index * size}: {int(counts[row, index])}"
    return [f"{name}: found {found} ({first}), expected at most {keep}"]


def check_sliding(name: str, mask: NDArray[np.bool_], stride: Fraction) -> list[str]:
    """Every kept position has a slot of its own, in their order, whose window reaches it."""
    columns = mask.shape[1]
    order = mask.cumsum(axis=1) - 1
    # The k-th kept position needs the first slot that reaches it, or the one behind that of the (k-1)-th.
    needed = np.where(mask, np.array(first_slots(columns, stride)) - order, 0)
    slots = np.maximum.accumulate(needed, axis=1) + order
    starts = np.array([*window_starts(columns, stride), *[columns] * columns])
    wrong = np.argwhere(mask & (starts[slots] > np.arange(columns)))
    if not len(wrong):
        return []
    row, column = map(int, wrong[0])
    found = f"{len(wrong)} kept positions without a slot (first at [{row}, {column}])"
    expected = f"one in each window of {WINDOW} that moves on by {float(stride):g}"
    return [f"{name}: found {found}, expected {expected}"]


def check_pairs(name: str, mask: NDArray[np.bool_]) -> list[str]:
    """Rows 2 i and 2 i + 1 keep the same positions."""
    paired = len(mask) // 2 * 2
    wrong = np.argwhere((mask[:paired:2] != mask[1:paired:2]).any(axis=1))
    if not len(wrong):
        return []
    row = 2 * int(wrong[0][0])
    found = f"{len(wrong)} pairs of rows with two masks (first rows {row} and {row + 1})"
    return [f"{name}: found {found}, expected one mask"]


def check_group(name: str, mask: NDArray[np.bool_], recipe: SparsityRecipe) -> list[str]:
    """The recipe's pattern, if it has one; of N:M with `mixed` N is the linear's own, from its density."""
    structure = recipe.structure
    if structure.stride:
        return check_sliding(name, mask, structure.stride)
    if structure.paired:
        return check_pairs(name, mask)
    if recipe.group is None:
        return []
    keep, size = recipe.group
    if recipe.mixed:
        keep = math.ceil(float(mask.mean()) * size - 1e-9)
    return check_pattern(name, mask, (keep, size))


def check_coverage(model: SparseModel, recipe: SparsityRecipe) -> list[str]:
    """Exactly the linears that the recipe prunes have a mask."""
    excluded = {n for n in model.linears if any(fnmatchcase(n, p) for p in recipe.exclude)}
    expected = set(model.linears) - excluded
    findings = [
        f"{n}: found no mask, expected one (the recipe prunes it)" for n in sorted(expected - model.masked)
    ]
    findings += [f"{n}: found a mask, expected none" for n in sorted(model.masked - expected)]
    return findings


def check_decoded(
    record: TensorRecord,
    decoded: NDArray[np.float32] | None,
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    group_size: int,
    grid: WeightGrid | None = None,
) -> tuple[list[str], float]:
    """What the artifact's bytes say against the merged weight: findings, and the largest error.

    `mask` is None for embedding and head; `group_size` is the recipe's. A value type that fits the `grid`
    that the weight was trained on must have exactly its values.
    """
    name = record.name
    if decoded is None:
        return [f"{name}: the artifact's decoder returned nothing, expected a weight {weight.shape}"], 0.0
    if decoded.shape != weight.shape:
        return [f"{name}: found shape {decoded.shape}, expected {weight.shape}"], 0.0
    findings = []
    if mask is not None:
        outside = int(((decoded != 0) & ~mask).sum())
        if outside:
            findings.append(f"{name}: found {outside} non-zero weights outside the mask, expected none")
        kept = int(mask.sum())
        if record.nnz != kept:
            findings.append(f"{name}: found nnz {record.nnz} in losa.json, expected {kept} as in the mask")
    size = record.group_size or group_size
    if grid is not None and grid.fits(record.value_type, size):
        trained = grid.values(weight)
        findings += _off_grid(name, decoded, trained)
        return findings, float(np.abs(decoded - trained).max())
    wrong, errors, first = 0, [], ""
    for rows in row_slices(*weight.shape):
        error = np.abs(decoded[rows] - weight[rows])
        over = ~(error <= VALUE_TYPES[record.value_type].error_bound(weight[rows], size))
        if over.any() and not wrong:
            row, column = map(int, np.argwhere(over)[0])
            row += rows.start
            first = f"[{row}, {column}]: {decoded[row, column]:.6g}, expected {weight[row, column]:.6g}"
        wrong += int(over.sum())
        errors.append(error.max())
    if wrong:
        findings.append(
            f"{name}: found {wrong} weights further off than {record.value_type} rounds (first at {first})"
        )
    return findings, float(np.max(errors))


def _off_grid(name: str, decoded: NDArray[np.float32], trained: NDArray[np.float32]) -> list[str]:
    """Values must be the trained ones bit for bit."""
    wrong = np.argwhere(decoded.view(np.uint32) != trained.view(np.uint32))
    if not len(wrong):
        return []
    row, column = map(int, wrong[0])
    first = f"[{row}, {column}]: {decoded[row, column]:.6g}, expected {trained[row, column]:.6g}"
    return [f"{name}: found {len(wrong)} weights that are not the trained ones (first at {first})"]


def check_grid(name: str, weight: NDArray[np.float32], grid: WeightGrid | None) -> list[str]:
    """A merged weight that was trained on a grid lies on it, up to the rounding of its own type."""
    if grid is None:
        return []
    trained = grid.values(weight)
    wrong = int((np.abs(weight - trained) > np.abs(trained) * 2.0**-8).sum())
    return [f"{name}: found {wrong} weights off the grid of grid.safetensors, expected none"] if wrong else []
