"""Rows of the zero-shot tasks from local files, in the fields that lm-eval's task descriptions read.

A row is one JSON object, as on the Hugging Face hub or in the plainer form that many copies have:
`choices` as a list of strings with the index `answer`, BoolQ's `answer` as true or false, HellaSwag's
whole context as `ctx`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from losa_deploy.errors import InputError, UsageError
from losa_deploy.text.corpus import read_lines

Row = Mapping[str, object]

NAMES = ("rows.jsonl.gz", "rows.jsonl")
"""A task's file in the folder named after it."""


def task_rows(folder: Path, task: str, limit: int | None) -> list[dict[str, object]]:
    """The first `limit` rows (None: all) of a task in lm-eval's fields.

    Raises `UsageError` for an unknown task or a missing file, `InputError` naming file, line and
    fields for a row that is none of the task's.
    """
    if task not in READERS:
        raise UsageError(f"There is no task {task!r}.", hint=f"Known tasks: {', '.join(READERS)}.")
    path = rows_file(folder, task)
    rows: list[dict[str, object]] = []
    for number, line in read_lines(path):
        if limit is not None and len(rows) == limit:
            break
        rows.append(_read_row(line, task, f"{path}, line {number}"))
    if not rows:
        raise InputError(f"{path} has no rows.", hint="Give a file with one JSON object per line.")
    return rows


def rows_file(folder: Path, task: str) -> Path:
    """`FOLDER/<task>/rows.jsonl.gz` (or .jsonl), or `FOLDER/<task>.jsonl.gz` (or .jsonl)."""
    places = [folder / task / name for name in NAMES] + [folder / f"{task}{name[4:]}" for name in NAMES]
    for path in places:
        if path.is_file():
            return path
    raise UsageError(
        f"{folder} has no rows of the task {task}.",
        hint=f"Expected {places[0]} or {places[3]}, one JSON object per line.",
    )


def _read_row(line: str, task: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where} is not valid JSON: {error}.", hint="Expected one JSON object per line."
        ) from None
    if not isinstance(row, dict):
        raise InputError(f"{where} holds a JSON {type(row).__name__}, expected an object.")
    try:
        return READERS[task](row)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{where} is no row of {task}: {reason}; fields found: {', '.join(row) or 'none'}.",
            hint=f"See docs/evaluation.md for the fields of {task}.",
        ) from None


def _text(row: Row, field: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise TypeError(f"{field} is a {type(value).__name__}, expected a string")
    return value


def _texts(value: object, field: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(v, str) and v for v in value):
        raise TypeError(f"{field} is no list of two or more strings")
    return value


def _index(row: Row, field: str, count: int, first: int = 0) -> int:
    """A number from `first` on, also as a string: which of `count` choices is right, counted from 0."""
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{field} is a {type(value).__name__}, expected a number")
    index = int(value) - first
    if not 0 <= index < count:
        raise ValueError(f"{field} is {value}, expected {first} to {first + count - 1}")
    return index


def _piqa(row: Row) -> dict[str, object]:
    texts = {field: _text(row, field) for field in ("goal", "sol1", "sol2")}
    return {**texts, "label": _index(row, "label", 2)}


def _hellaswag(row: Row) -> dict[str, object]:
    endings = _texts(row["endings"], "endings")
    if "ctx_a" in row:
        context = {field: _text(row, field) for field in ("activity_label", "ctx_a", "ctx_b")}
    else:
        activity, colon, rest = _text(row, "ctx").partition(": ")
        if not colon:
            raise ValueError("ctx has no `activity: ` at its start")
        context = {"activity_label": activity, "ctx_a": rest, "ctx_b": ""}
    return {**context, "endings": endings, "label": str(_index(row, "label", len(endings)))}


def _winogrande(row: Row) -> dict[str, object]:
    texts = {field: _text(row, field) for field in ("sentence", "option1", "option2")}
    if "_" not in texts["sentence"]:
        raise ValueError("sentence has no _")
    return {**texts, "answer": str(_index(row, "answer", 2, first=1) + 1)}


def _question(field: str) -> Callable[[Row], dict[str, object]]:
    """A reader of ARC and OpenBookQA, whose question is in `field` on the hub."""

    def read(row: Row) -> dict[str, object]:
        question = _text(row, field if field in row else "question")
        choices = row["choices"]
        if isinstance(choices, dict):
            texts, labels = _texts(choices["text"], "text"), _texts(choices["label"], "label")
            right = labels.index(_text(row, "answerKey").strip())
        else:
            texts = _texts(choices, "choices")
            right = _index(row, "answer", len(texts))
        letters = [chr(ord("A") + i) for i in range(len(texts))]
        return {field: question, "choices": {"text": texts, "label": letters}, "answerKey": letters[right]}

    return read


def _boolq(row: Row) -> dict[str, object]:
    texts = {field: _text(row, field) for field in ("question", "passage")}
    if "label" in row:
        return {**texts, "label": _index(row, "label", 2)}
    if not isinstance(row["answer"], bool):
        raise TypeError("answer is neither true nor false")
    return {**texts, "label": int(row["answer"])}


def _rte(row: Row) -> dict[str, object]:
    texts = {field: _text(row, field) for field in ("sentence1", "sentence2")}
    return {**texts, "label": _index(row, "label", 2)}


READERS: Mapping[str, Callable[[Row], dict[str, object]]] = {
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _question("question"),
    "arc_challenge": _question("question"),
    "openbookqa": _question("question_stem"),
    "boolq": _boolq,
    "rte": _rte,
}
"""Task → the function that reads one row; the seven tasks of the literature, then RTE."""
