"""Verification: is a folder what its manifest says, and does the artifact compute the merged model?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.compress.memory import all_parameters, available_bytes
from losa_deploy.interfaces import Exporter, Runtime
from losa_deploy.lazy import lazily
from losa_deploy.manifest import Manifest
from losa_deploy.model import SparseModel
from losa_deploy.recipe import VerifyRecipe
from losa_deploy.text.tokenizer import load_tokenizer
from losa_deploy.verify.judge import Parity, judge
from losa_deploy.verify.oracle import Oracle
from losa_deploy.verify.questions import Answers, Questions, ask, examine
from losa_deploy.verify.stored import (
    check_coverage,
    check_decoded,
    check_files,
    check_finite,
    check_grid,
    check_group,
    check_side_files,
    check_support,
)

__all__ = ["MergedCheck", "Parity", "verify_export", "verify_merged"]


@dataclass(frozen=True)
class MergedCheck:
    """The verdict on a merged folder; `reasons` is empty if and only if it is `ok`."""

    ok: bool
    reasons: tuple[str, ...]
    linears: int
    positions: int
    """Weights of all masked linears."""
    kept: int
    sparsity: float
    """Pruned share of `positions`, from the masks."""


def verify_merged(model: SparseModel, suffixes: Sequence[str] = ()) -> MergedCheck:
    """Files, masks, zeros, pattern, counts and values of a merged folder, tensor by tensor.

    `suffixes` are those of weight files of other formats, which must not lie in it (see `check_files`).
    Damaged files stop the check before any of them is read further.
    """
    manifest = model.manifest
    reasons = [*check_files(model.folder, manifest, suffixes), *check_side_files(model.folder)]
    if reasons:
        return MergedCheck(False, tuple(reasons), len(manifest.linears), 0, 0, 0.0)
    reasons += check_coverage(model, manifest.recipe.sparsity)
    records = {record.name: record for record in manifest.linears}
    kept = positions = 0
    for name in model.linears:
        mask = model.mask(name)
        count = int(mask.sum())
        reasons += check_grid(name, model.weight(name), model.grid(name))
        reasons += check_support(name, model.checkpoint.tensor(f"{name}.weight"), mask)
        if name in model.masked:
            kept, positions = kept + count, positions + mask.size
            reasons += check_group(name, mask, manifest.recipe.sparsity)
        if name not in records:
            reasons.append(f"{name}: found no entry in losa.json, expected one")
        elif records[name].nnz != count:
            reasons.append(f"{name}: found nnz {records[name].nnz} in losa.json, expected {count}")
    for name in model.checkpoint.files:
        reasons += check_finite(name, model.checkpoint.tensor(name))
    sparsity = 1.0 - kept / max(1, positions)
    if abs(sparsity - manifest.sparsity_achieved) > 1e-6:
        reasons.append(
            f"losa.json: found sparsity {manifest.sparsity_achieved:.6f}, the masks give {sparsity:.6f}"
        )
    return MergedCheck(not reasons, tuple(reasons), len(model.linears), positions, kept, sparsity)


def verify_export(
    folder: Path,
    model: SparseModel,
    exporter: Exporter,
    runtime: Runtime,
    recipe: VerifyRecipe,
    *,
    threads: int,
    memory: int | None = None,
) -> Parity:
    """Check an exported folder against the merged model it came from, in the runtime it is for.

    Besides the open runtime one weight or one block is in memory at a time. The runtime without kernels of
    ours, which computes in f32, is left out if the model has not got that many bytes of `memory` (None: what
    is free).

    Damaged files stop the check before any of them is opened. Raises only for what keeps the
    check from running (a missing runtime, an unreadable text); a failed check is in `reasons`.
    """
    manifest = Manifest.read(folder)
    reasons = [*check_files(folder, manifest, exporter.suffixes), *check_side_files(folder)]
    if manifest.kind != "exported":
        reasons.append(f"losa.json: found kind {manifest.kind!r}, expected 'exported'")
    if reasons:
        return Parity(False, tuple(reasons))
    if beside := exporter.decode_beside(folder):
        as_beside = manifest.model_copy(update={"linears": beside.linears})
        reasons, error = _check_weights(as_beside, model, beside.weights)
        if reasons:
            return Parity(False, tuple(f"portable file: {r}" for r in reasons), largest_weight_error=error)
    del beside
    decoded = exporter.decode(folder)
    reasons, error = _check_weights(manifest, model, decoded)
    if reasons:
        return Parity(False, tuple(reasons), largest_weight_error=error)
    questions = Questions.make(model, recipe, load_tokenizer(model.folder))
    actual = ask(runtime.open(folder, threads=threads), questions)
    plain = runtime.exact()
    stock: Answers | None = actual
    if plain is not runtime:
        room = available_bytes() if memory is None else memory
        needed = plain.loading_bytes * all_parameters(model.checkpoint)
        fits = needed <= room
        stock = ask(plain.open(folder, threads=threads), questions) if fits else None
    oracle = Oracle(model.checkpoint, _overrides(model, decoded))
    exact = examine(oracle, questions, stock or actual, threads=threads)
    merged = examine(Oracle(model.checkpoint), questions, actual, threads=threads)
    return judge(
        actual,
        stock,
        exact,
        merged,
        questions,
        model=model,
        value_types=[r.value_type for r in (*manifest.linears, *manifest.other_tensors)],
        weight_error=error,
    )


def _check_weights(
    manifest: Manifest, model: SparseModel, decoded: Mapping[str, NDArray[np.float32]]
) -> tuple[list[str], float]:
    reasons: list[str] = []
    largest = 0.0
    listed = {record.name for record in manifest.linears}
    reasons += [f"{n}: found no entry in losa.json, expected one" for n in model.linears if n not in listed]
    group_size = manifest.recipe.export.group_size
    for record in manifest.linears:
        if record.name not in model.linears:
            reasons.append(f"{record.name}: found in losa.json, but the merged model has no such linear")
            continue
        found, error = check_decoded(
            record,
            decoded.get(record.name),
            model.weight(record.name),
            model.mask(record.name),
            group_size,
            model.grid(record.name),
        )
        reasons += found
        largest = max(largest, error)
    for record in manifest.other_tensors:
        if record.value_type == "f32" and record.name not in decoded:
            continue
        weight = model.weight(_stored_name(model, record.name))
        found, error = check_decoded(record, decoded.get(record.name), weight, None, group_size)
        reasons += found
        largest = max(largest, error)
    return reasons, largest


def _stored_name(model: SparseModel, module: str) -> str:
    """Where a module's weight lies in the merged folder: a tied head is the embedding."""
    if module == model.family.head and model.checkpoint.tied:
        return model.family.embedding
    return module


def _overrides(
    model: SparseModel, decoded: Mapping[str, NDArray[np.float32]]
) -> Mapping[str, NDArray[np.float32]]:
    """Decoded weights for the oracle; a tied head follows the embedding if only one was decoded."""
    if not model.checkpoint.tied:
        return decoded
    embedding, head = model.family.embedding, model.family.head
    known = lazily(decoded)
    return known.renamed({embedding: head, head: embedding}).joined(known)
