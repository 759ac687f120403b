"""The result of a grid as people read it: a table, and quality against bytes as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .grid import Grid, number_of
from .report.render import markdown_table
from .svg import Point, scatter

Rows = Sequence[Mapping[str, object]]


def header(rows: Rows) -> tuple[str, ...]:
    """Names of the columns; accuracy only where tasks were asked."""
    tasks = ("acc",) if _has_tasks(rows) else ()
    sizes = ("bits", "MB", "make s", "make RAM MB", "run RAM MB")
    return ("row", "perplexity", "KL", "same top", *tasks, *sizes)


def table_rows(rows: Rows) -> list[tuple[str, ...]]:
    """A line per row; of one that failed the name and that."""
    tasks, width = _has_tasks(rows), len(header(rows))
    return [
        _cells(row, tasks=tasks)
        if row["status"] == "ok"
        else (str(row["name"]), "failed", *[""] * (width - 2))
        for row in rows
    ]


def _has_tasks(rows: Rows) -> bool:
    return any(number_of(row, "tasks_mean", "acc") is not None for row in rows)


def _cells(row: Mapping[str, object], *, tasks: bool) -> tuple[str, ...]:
    def cell(form: str, *keys: str, scale: float = 1.0) -> str:
        value = number_of(row, *keys)
        return "" if value is None else form.format(value * scale)

    accuracy = cell("{:.2f} %", "tasks_mean", "acc", scale=100) + cell(
        " ± {:.2f} %", "tasks_mean", "acc_stderr", scale=100
    )
    return (
        str(row["name"]),
        cell("{:.3f}", "perplexity") + cell(" ± {:.3f}", "perplexity_stderr"),
        cell("{:.4f}", "kl_to_dense"),
        cell("{:.2f} %", "same_top_to_dense", scale=100),
        *((accuracy,) if tasks else ()),
        cell("{:.2f}", "block_bits_per_weight") + cell(" (grid {:.2f})", "grid_bits_per_weight"),
        cell("{:.1f}", "bytes", scale=1e-6),
        cell("{:.0f}", "make_seconds"),
        cell("{:.0f}", "make_peak_rss_bytes", scale=1e-6),
        cell("{:.0f}", "run_peak_rss_bytes", scale=1e-6),
    )


def markdown(rows: Rows, grid: Grid) -> str:
    """`table.md`: how it was measured, the table, what failed."""
    first = next((row for row in rows if row["status"] == "ok"), None)
    text = "the built-in text" if grid.text == "builtin" else f"`{grid.text.rpartition('/')[2]}`"
    scored = f", {first['tokens']} predictions in windows of {first['window']}" if first else ""
    failed = [f"- {row['name']}: {_message(row)}" for row in rows if row["status"] != "ok"]
    how = (
        f"Perplexity on {text}{scored}, as `losa-deploy evaluate` measures it (docs/evaluation.md), ± one "
        "standard error. KL (nats) and same top token: against the dense model on the same positions. bits: "
        "stored bits per weight of the block linears. make: compress, merge and export, or quantize. RAM: "
        "peak of that process, and of a fresh one that runs the model."
    )
    lines = [
        how,
        "",
        *markdown_table(header(rows), table_rows(rows)),
        "",
        "![Quality against bytes](quality.svg)",
        *(["", "Failed:", "", *failed] if failed else []),
    ]
    return "\n".join(lines) + "\n"


def _message(row: Mapping[str, object]) -> str:
    error = row.get("error")
    return str(error["message"]) if isinstance(error, Mapping) else "unknown"


def quality_plot(rows: Rows) -> str:
    """`quality.svg`: perplexity (logarithmic) against megabytes, a point per row with its error."""
    points = []
    for row in rows:
        size, value = number_of(row, "bytes"), number_of(row, "perplexity")
        if row["status"] == "ok" and size is not None and value is not None:
            error = number_of(row, "perplexity_stderr") or 0.0
            group = next(kind for kind in ("peer", "dense", "recipe") if kind in _row_of(row))
            points.append(Point(size / 1e6, value, error, str(row["name"]), group))
    return scatter(points, "Quality against bytes", "MB", "perplexity")


def _row_of(row: Mapping[str, object]) -> Mapping[str, object]:
    found = row.get("row")
    return found if isinstance(found, Mapping) else {}
