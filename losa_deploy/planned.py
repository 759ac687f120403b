"""Exports by a plan: what was planned is what is written, and the comparison that proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

from losa_deploy.errors import InputError, LosaError
from losa_deploy.interfaces import ExportedModel, Exporter, ExportPlan, PlannedTensor, Shapes
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress

LINEAR_BYTES, TABLE_BYTES = 20, 12
"""Per weight of a linear, and of an embedding or head, what is in memory while it is packed or checked."""


def packing_bytes(linears: Iterable[tuple[int, int]], tables: Iterable[tuple[int, int]]) -> int:
    """Memory that packing tensors of these shapes (out, in) takes, one at a time."""
    sizes = (
        *(LINEAR_BYTES * prod(shape) for shape in linears),
        *(TABLE_BYTES * prod(shape) for shape in tables),
    )
    return max(sizes, default=0)


def export_planned(
    exporter: Exporter, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress
) -> ExportedModel:
    """Write `model` into the empty `folder` as `plan` says, and check that this is what was written."""
    exported = exporter.export(model, plan, folder, progress)
    check_written(plan, exported)
    return exported


def check_written(plan: ExportPlan, exported: ExportedModel) -> None:
    """Raise `LosaError`, a bug of the exporter, naming the first tensor or file that is not as planned."""
    planned = {t.name: (t.layout, t.value_type, t.shape, t.nnz, t.bytes) for t in plan.tensors}
    written = {t.name: (t.layout, t.value_type, t.shape, t.nnz, t.bytes) for t in exported.tensors}
    for name in {**planned, **written}:
        expected, found = planned.get(name), written.get(name)
        if expected != found:
            raise _bug(plan, name, _stored(found), _stored(expected))
    missing = [name for name in plan.files if name not in exported.files]
    if missing:
        raise _bug(plan, missing[0], "no such file", f"one of about {plan.files[missing[0]]} bytes")


def each_shape_once(
    linears: Shapes, make: Callable[[str, tuple[int, int]], PlannedTensor]
) -> Iterator[PlannedTensor]:
    """Every linear as `make` plans the first of its shape: before there are masks, nothing else differs."""
    made: dict[tuple[int, int], PlannedTensor] = {}
    for name, shape in linears.items():
        if shape not in made:
            made[shape] = make(name, shape)
        yield replace(made[shape], name=name)


@contextmanager
def storing(tensor: PlannedTensor) -> Iterator[None]:
    """While a planned tensor is packed: a weight that its type cannot hold is an `InputError` naming it."""
    try:
        yield
    except ValueError as error:
        raise InputError(
            f"{tensor.name} cannot be stored as {tensor.value_type}: {error}.",
            hint="Choose another --value-type, e.g. f32.",
            details={"tensor": tensor.name},
        ) from None


def _stored(facts: tuple[str, str, tuple[int, ...], int, int] | None) -> str:
    if facts is None:
        return "nothing"
    layout, value_type, shape, nnz, size = facts
    return f"{layout} {value_type} {'x'.join(map(str, shape))} with {nnz} values in {size} bytes"


def _bug(plan: ExportPlan, name: str, found: str, expected: str) -> LosaError:
    return LosaError(
        f"The exporter {plan.format} did not write what it planned: {name}: found {found}, "
        f"expected {expected}.",
        hint="This is a bug; please report it with the command line and losa.json of the merged model.",
        details={"tensor": name},
    )
