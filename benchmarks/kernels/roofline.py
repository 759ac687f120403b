"""The kernels below the roof of the memory: bits per weight against weights per second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from losa_deploy.errors import MissingError, UsageError

from .table import KernelRow, KernelTable

SUFFIXES = (".svg", ".png", ".pdf")
MARKERS = {"dense": "s", "bitmask": "o", "nm": "^", "tiled": "D", "sliding": "v"}
COLOURS = {"f32": "tab:gray", "f16": "tab:green", "i8": "tab:blue", "i4": "tab:red", "i3": "tab:purple"}


def check_plot(file: Path) -> None:
    """Raise before anything is measured: `MissingError` without matplotlib, `UsageError` for the name."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError(
            "--plot needs matplotlib, which is not installed.",
            hint="Run `pip install 'losa-deploy[plots]'`, or leave out --plot.",
        )
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {file} is of no known kind.", hint=f"Use one of {', '.join(SUFFIXES)}.")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {file.parent}.", hint="Make it first.")


def plot(table: KernelTable, file: Path) -> None:
    """Rows of one token with all threads on the fastest target: how near each comes to the read rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = plotted_rows(table)
    if not rows:
        raise UsageError("--plot shows the rows of one token, and there are none.", hint="Add --tokens 1.")
    threads, target = rows[0].threads, rows[0].target
    bandwidth = table.read_bandwidth[threads]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [(row, table.record(row)) for row in rows]
    bits = [float(str(record["bits_per_weight"])) for _, record in points]
    ends = [min(bits) * 0.8, max(bits) * 1.25]
    label = f"read rate of the memory, {bandwidth / 1e9:.1f} GB/s"
    axes.plot(ends, [8 * bandwidth / b / 1e9 for b in ends], color="black", label=label)
    for index, ((row, record), x) in enumerate(zip(points, bits, strict=True)):
        y = float(str(record["weights_per_second"])) / 1e9
        axes.plot(
            x, y, MARKERS[row.storage.layout], color=COLOURS[row.storage.value_type], markersize=7, alpha=0.85
        )
        share = 100 * float(str(record["share_of_read_bandwidth"]))
        axes.annotate(
            f"{row.storage.label} ({share:.0f} %)",
            (x, y),
            xytext=(6, 2 - 9 * (index % 2)),
            textcoords="offset points",
            fontsize=6,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.set_xlabel("stored bits per weight (bytes read per token, divided by the weights)")
    axes.set_ylabel("G weights/s")
    axes.set_title(f"{table.plan.rows} x {table.plan.columns}, one token, {target}, {threads} threads")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def plotted_rows(table: KernelTable) -> list[KernelRow]:
    """Rows of one token, with the most threads, on the last (fastest) target."""
    threads, target = max(table.plan.threads), table.plan.targets[-1]
    return [row for row in table.rows if (row.tokens, row.threads, row.target) == (1, threads, target)]
