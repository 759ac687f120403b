"""The training of a run as curves: held-out error of the blocks, and loss through the whole model."""

from __future__ import annotations

from collections.abc import Sequence

from losa_deploy.manifest import TrainingRecord

from .svg import Curve, lines, stack

FILE = "training.svg"


def training_plot(records: Sequence[TrainingRecord]) -> str:
    """One chart per kind of phase that trained; "" if none did."""
    blocks, losses = [], []
    for record in records:
        name = f"step {record.step}, phase {record.phase}"
        if record.after:
            blocks += [Curve(f"{name}: before", record.before), Curve(f"{name}: after", record.after)]
        if record.losses:
            losses.append(Curve(name, record.losses))
    charts = []
    if blocks:
        charts.append(lines(blocks, "Held-out error of the blocks", "block", "relative error"))
    if losses:
        charts.append(lines(losses, "Loss through the whole model", "part of the training", "loss"))
    return stack(charts) if charts else ""


def training_section(records: Sequence[TrainingRecord]) -> list[str]:
    """The part of `report.md`: the picture, and a line per phase."""
    if not any(record.after or record.losses for record in records):
        return []
    return ["## Training", "", f"![Training]({FILE})", "", *map(_line, records), ""]


def _line(record: TrainingRecord) -> str:
    start = f"- step {record.step}, phase {record.phase}: {record.tokens:,} tokens"
    if record.after and record.before:
        return (
            f"{start} per block, error {_mean(record.before):.4f} → {_mean(record.after):.4f} over the blocks"
        )
    if record.losses:
        return f"{start}, loss {record.losses[0]:.4f} → {record.losses[-1]:.4f}"
    return start


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
