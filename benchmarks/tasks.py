"""The zero-shot tasks of the literature: accuracies by lm-eval, and their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from losa_deploy.errors import MissingError
from losa_deploy.interfaces import Session
from losa_deploy.progress import Progress
from losa_deploy.text.tokenizer import Tokenizer

LM_EVAL = "lm-eval==0.4.13"
"""One version: the descriptions of the tasks are read from inside the package."""
SEVEN = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq")


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of one task; for `acc_norm`, log-likelihoods are divided by the answer's characters."""

    name: str
    rows: int
    acc: float
    acc_stderr: float | None
    """None for a single row."""
    acc_norm: float | None
    """None where lm-eval has none: WinoGrande, BoolQ, RTE."""
    acc_norm_stderr: float | None

    def to_json(self) -> dict[str, object]:
        """The numbers, without those that the task has not."""
        numbers = ("rows", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        found = {key: getattr(self, key) for key in numbers}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class TaskMean:
    """Unweighted mean over tasks; a task without `acc_norm` enters that mean with its `acc`."""

    tasks: tuple[str, ...]
    acc: float
    acc_stderr: float | None
    """Of independent tasks: the root of the sum of squares over their number."""
    acc_norm: float
    acc_norm_stderr: float | None

    def to_json(self) -> dict[str, object]:
        """All fields."""
        return {**vars(self), "tasks": list(self.tasks)}


def require_lm_eval() -> None:
    """Raise `MissingError` with the command that installs lm-eval if it cannot be imported."""
    try:
        from . import task_model  # noqa: F401
    except ImportError as error:
        raise MissingError(
            f"The zero-shot tasks need {LM_EVAL}, which cannot be imported here ({error}).",
            hint=f"Run `pip install {LM_EVAL}`.",
        ) from None


def run_tasks(
    session: Session,
    tokenizer: Tokenizer,
    rows: Mapping[str, list[dict[str, object]]],
    progress: Progress,
) -> tuple[list[TaskResult], int]:
    """Every task on its rows (`task_rows`), and the number of requests that the context cut short."""
    from .task_model import SessionModel, evaluate_tasks

    model = SessionModel(session, tokenizer, progress)
    found = evaluate_tasks(model, rows)
    return [_result(name, len(rows[name]), found[name]) for name in rows], model.truncated


def mean_of_tasks(results: Sequence[TaskResult], *, without: str = "") -> TaskMean | None:
    """The mean over those of the seven tasks that were run, but for `without`; None if none was."""
    chosen = [r for r in results if r.name in SEVEN and r.name != without]
    if not chosen:
        return None
    normed = [r.acc if r.acc_norm is None else r.acc_norm for r in chosen]
    errors = [r.acc_stderr if r.acc_norm is None else r.acc_norm_stderr for r in chosen]
    return TaskMean(
        tuple(r.name for r in chosen),
        sum(r.acc for r in chosen) / len(chosen),
        _mean_error([r.acc_stderr for r in chosen]),
        sum(normed) / len(chosen),
        _mean_error(errors),
    )


def _mean_error(errors: Sequence[float | None]) -> float | None:
    known = [e for e in errors if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if len(known) == len(errors) else None


def _result(name: str, rows: int, found: Mapping[str, object]) -> TaskResult:
    def number(metric: str) -> float | None:
        value = found.get(f"{metric},none")
        return float(value) if isinstance(value, int | float) else None

    acc = number("acc")
    assert acc is not None, f"lm-eval gave no accuracy of {name}: {sorted(found)}"
    return TaskResult(name, rows, acc, number("acc_stderr"), number("acc_norm"), number("acc_norm_stderr"))
