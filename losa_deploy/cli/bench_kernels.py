"""`losa-deploy bench kernels`: the native kernels on one large matrix, beside the memory's read rate."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.bench_geometry import check_sparsity, parse_pattern, pick, split
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.benchmarks.kernels.table import KernelPlan, KernelTable

LAYOUTS = ("dense", "bitmask", "pair", "sliding", "2:4", "4:8", "2:8", "1:4", "8:16", "6:16", "4:16")
VALUE_TYPES = ("f32", "f16", "i8", "i4", "i3")
SPARSITIES = (0.5, 0.6, 0.7)
ROWS, COLUMNS = 4096, 11_008


def run_kernels(args: argparse.Namespace, console: Console) -> None:
    """Measure and write the table or document, and the plot and the comparison that are asked for."""
    from losa_deploy.benchmarks.kernels.table import kernel_document, measure_kernels

    plan = chosen_plan(args)
    if args.plot is not None:
        from losa_deploy.benchmarks.kernels.roofline import check_plot

        check_plot(args.plot)
    with console.stage("kernels") as progress:
        found = measure_kernels(plan, progress=progress)
    document = kernel_document(found)
    if args.deepsparse is not None:
        console.info("Measuring DeepSparse on the same machine …")
        document["deepsparse"] = _deepsparse(args.deepsparse, plan)
    if args.plot is not None:
        from losa_deploy.benchmarks.kernels.roofline import plot

        plot(found, args.plot)
        console.info(f"Wrote {args.plot}")
    if args.json:
        console.result_json(document)
    else:
        console.result(_table(found))
        for row in _records(document.get("deepsparse")):
            console.result(
                f"DeepSparse {row['version']} f32 {100 * float(str(row['sparsity'])):g} %, "
                f"{row['threads']} threads, {row['tokens']} tokens: "
                f"{float(str(row['weights_per_second'])) / 1e9:.2f} G weights/s"
            )


def chosen_plan(args: argparse.Namespace) -> KernelPlan:
    """What the flags ask for; `UsageError` for unknown names."""
    from losa_deploy import _native
    from losa_deploy.benchmarks.kernels.table import KernelPlan, default_storages

    layouts = split(args.layouts) if args.layouts else list(LAYOUTS)
    for name in layouts:
        if name not in ("dense", "bitmask", "pair", "sliding"):
            if ":" not in name:
                pick(name, dict.fromkeys(LAYOUTS), "layout", "--layouts")
            parse_pattern(name)
    types = split(args.value_types) if args.value_types else list(VALUE_TYPES)
    for name in types:
        pick(name, dict.fromkeys(VALUE_TYPES), "value type", "--value-types")
    available = _native.targets()
    targets = split(args.targets) if args.targets else available
    for name in targets:
        pick(name, dict.fromkeys(available), "target that this CPU can run", "--targets")
    sparsities = [float(x) for x in args.sparsity or SPARSITIES]
    for sparsity in sparsities:
        check_sparsity(sparsity)
    if args.seconds is not None and args.seconds <= 0:
        raise UsageError("--seconds has to be more than 0.", hint="Leave it out for the default.")
    most = thread_count(args)
    threads = (most,) if args.threads else tuple(sorted({1, most}))
    shape = (args.rows or ROWS, args.columns or COLUMNS)
    storages = default_storages(layouts, types, sparsities)
    plan = KernelPlan(*shape, storages, tuple(targets), threads, seed=args.seed)
    changes = {"tokens": tuple(args.tokens or ()), "seconds": args.seconds}
    return dataclasses.replace(plan, **{key: value for key, value in changes.items() if value})


def _deepsparse(python: Path, plan: KernelPlan) -> list[dict[str, object]]:
    """DeepSparse on matrices of the same shape, at the bitmask sparsities."""
    from losa_deploy.benchmarks.kernels.deepsparse_peer import measure_deepsparse

    sparsities = sorted({s.sparsity for s in plan.storages if s.layout == "bitmask"}) or [SPARSITIES[-1]]
    return measure_deepsparse(python, (plan.rows, plan.columns), sparsities, plan.tokens, plan.threads)


def _records(value: object) -> Sequence[dict[str, object]]:
    return value if isinstance(value, list) else ()


def _table(found: KernelTable) -> str:
    header = ("storage", "bits", "target", "threads", "tokens", "G weights/s", "GB/s", "of read rate")
    rows = []
    for row in found.rows:
        record = {key: value for key, value in found.record(row).items() if isinstance(value, (int, float))}
        cells = (
            row.storage.label,
            f"{record['bits_per_weight']:.2f}",
            row.target,
            str(row.threads),
            str(row.tokens),
            f"{record['weights_per_second'] / 1e9:.2f}",
            f"{record['bytes_per_second'] / 1e9:.2f}",
            f"{100 * record['share_of_read_bandwidth']:.0f} %",
        )
        rows.append(cells)
    reads = ", ".join(f"{rate / 1e9:.1f} GB/s with {n}" for n, rate in sorted(found.read_bandwidth.items()))
    return f"{table(header, rows)}\n\nread rate of the memory: {reads} threads"
