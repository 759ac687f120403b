"""What a run would write: shown by `--dry-run`, checked against disk and memory before any work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli import expect
from losa_deploy.console import Console, table
from losa_deploy.errors import MissingError, ResourceError
from losa_deploy.output import free_bytes, require_disk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from losa_deploy.compress.estimate import Estimate
    from losa_deploy.interfaces import Exporter, ExportPlan, PlannedTensor, Shapes
    from losa_deploy.recipe import Recipe, SparsityRecipe

LIBRARY_BYTES = 1_000_000_000
"""What torch, transformers and ONNX Runtime take before a model is loaded."""
RIVAL_BYTES = 0.6
"""Per parameter of llama.cpp's file, which is open beside ours while both are timed."""


def estimate(exporter: Exporter, linears: Shapes, others: Shapes, recipe: Recipe, memory: int) -> ExportPlan:
    """A plan from shapes alone, for a model that is not compressed yet, with `memory` bytes at hand.

    `linears` are pruned at the recipe's mean rate, `others` (embedding, head) stay dense. Small
    tensors, graph and tokenizer are left out.
    """
    from losa_deploy.interfaces import ExportPlan
    from losa_deploy.planned import packing_bytes

    export = recipe.export
    files = exporter.estimate(linears, others, export, partial(expected_mask, recipe.sparsity))
    parameters = sum(rows * columns for rows, columns in (*linears.values(), *others.values()))
    sizes = {file: sum(tensor.bytes for tensor in tensors) for file, tensors in files.items()}
    compared = max(sizes.values()) + RIVAL_BYTES * parameters
    judged = 8 * sum(rows * columns for rows, columns in others.values())
    loaded = _loading_bytes(exporter) * parameters
    exact = loaded if recipe.verify.level != "off" and LIBRARY_BYTES + loaded <= memory else 0
    packed = packing_bytes(linears.values(), others.values())
    peak = LIBRARY_BYTES + int(max(compared, judged, exact, packed))
    return ExportPlan(exporter.name, export, sizes, next(iter(files.values())), peak)


def expected_mask(sparsity: SparsityRecipe, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask [out, in] of the recipe's pattern and rate: the first columns (of each group or window).

    Odd rows keep others, the last ones or those behind, unless pairs of rows are to share their masks.
    """
    import numpy as np

    from losa_deploy.structure import window_starts

    columns = np.arange(shape[1])
    group, stride = sparsity.group, sparsity.structure.stride
    if stride:
        starts = np.array(window_starts(shape[1], stride))
        even, odd = np.isin(columns, np.maximum(starts, 0)), np.isin(columns, starts + 1)
    elif group:
        even, odd = columns % group[1] < group[0], columns % group[1] >= group[1] - group[0]
    else:
        kept = round(shape[1] * (1 - sparsity.target))
        even, odd = columns < kept, columns >= shape[1] - kept
    mask = np.ascontiguousarray(np.broadcast_to(even, shape))
    if not sparsity.structure.paired:
        mask[1::2] = odd
    return mask


def _loading_bytes(exporter: Exporter) -> float:
    """Per parameter, of the runtime without our kernels that judges an export where it fits."""
    from losa_deploy import plugins
    from losa_deploy.interfaces import Runtime

    try:
        return plugins.load_runtime(exporter.runtime).exact().loading_bytes
    except MissingError:  # an export will say so; a plan needs no runtime
        return Runtime.loading_bytes


def line(plan: ExportPlan, output: Path) -> str:
    """The plan in one line."""
    return (
        f"Plan: {plan.format}, {plan.total_bytes / 1e6:,.1f} MB in {output}, "
        f"peak memory about {plan.peak_ram_bytes / 1e9:.1f} GB"
    )


def require_resources(plan: ExportPlan, output: Path) -> None:
    """Raise `ResourceError` if the plan does not fit on this machine's disk or into its memory."""
    import psutil

    require_disk(output, plan.total_bytes, "The exported model")
    available = int(psutil.virtual_memory().available)
    if available < plan.peak_ram_bytes:
        raise ResourceError(
            f"This needs about {plan.peak_ram_bytes / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available.",
            hint="Close other programs, or use a smaller model.",
            details={"needed_bytes": plan.peak_ram_bytes, "available_bytes": available},
        )


def show(
    plan: ExportPlan,
    output: Path,
    console: Console,
    *,
    as_json: bool,
    estimated: bool = False,
    first: Estimate | None = None,
) -> None:
    """Print a plan as the result of a dry run; raises `ResourceError` if it does not fit.

    `first` is what the compression before it takes.
    """
    if as_json:
        before = {"compress": expect.document(first)} if first else {}
        console.result_json({**_document(plan, output, estimated=estimated), **before})
    else:
        if first:
            console.result(expect.line(first))
        console.result(line(plan, output) + (" (estimated from shapes)" if estimated else ""))
        rows = [(name, f"{size / 1e6:,.1f} MB") for name, size in plan.files.items()]
        console.result(table(("file", "size"), rows))
        console.result("")
        header = ("tensor", "shape", "layout", "values", "bytes", "bits/weight", "reason")
        console.result(table(header, [_row(t) for t in plan.tensors]))
    require_resources(plan, output)


def _row(tensor: PlannedTensor) -> tuple[str, ...]:
    shape = "x".join(map(str, tensor.shape))
    size, bits = f"{tensor.bytes:,}", f"{tensor.bits_per_weight:.3f}"
    return (tensor.name, shape, tensor.layout, tensor.value_type, size, bits, tensor.reason)


def _document(plan: ExportPlan, output: Path, *, estimated: bool) -> dict[str, object]:
    return {
        "schema": "losa.plan/1",
        "format": plan.format,
        "output": str(output),
        "estimated": estimated,
        "total_bytes": plan.total_bytes,
        "peak_ram_bytes": plan.peak_ram_bytes,
        "disk_free_bytes": free_bytes(output),
        "files": dict(plan.files),
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "layout": t.layout,
                "value_type": t.value_type,
                "nnz": t.nnz,
                "bytes": t.bytes,
                "bits_per_weight": t.bits_per_weight,
                "reason": t.reason,
            }
            for t in plan.tensors
        ],
    }
