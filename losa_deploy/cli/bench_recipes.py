"""`losa-deploy bench recipes GRID.yaml`: recipes and opponents on one model, one text, in one table.

Every finished row is a JSON file, so that a run that was stopped goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from losa_deploy.cli.bench_row import Made, RowJob, open_model
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import GateError, InputError, LosaError

if TYPE_CHECKING:
    from losa_deploy.benchmarks.grid import Grid, Row
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.sources.checkpoint import Checkpoint

SCHEMA, ROW_SCHEMA = "losa.grid/1", "losa.grid-row/1"
RESULTS = ".results"
COPIED = (
    "runtime",
    "perplexity",
    "perplexity_stderr",
    "tokens",
    "window",
    "kl_to_dense",
    "kl_to_dense_stderr",
    "same_top_to_dense",
    "same_top_to_dense_stderr",
    "tasks_mean",
)
"""Keys of `losa.evaluate/2` that a row has at its top."""


@dataclass(frozen=True)
class Place:
    """What all rows share."""

    grid: Grid
    output: Path
    source: Checkpoint
    dense: Path | None
    threads: int

    @property
    def shared(self) -> Path:
        """Converted source, importances, dense GGUF."""
        return self.output / "work"

    def result(self, key: str) -> Path:
        """Where a finished row is kept."""
        return self.output / "rows" / f"{key}.json"


def run_recipes(args: argparse.Namespace, console: Console) -> None:
    """Make and measure the missing rows, then write table, plot and document; `GateError` if a row failed."""
    from losa_deploy.benchmarks.grid import read_grid

    path = Path(args.paths[1])
    grid = read_grid(path)
    output: Path = args.output or path.with_name(path.stem + RESULTS)
    text_hash, tasks_hash = _text_hash(grid), _tasks_hash(grid)
    for folder in ("rows", "logs", "work"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    with console.captured(output / "logs" / "grid.log"):
        source, record = open_model(grid.model, output / "work", console)
        keys = [_key(row, grid, record, text_hash, tasks_hash) for row in grid.rows]
        dense = _dense_gguf(grid, keys, source, record, output)
    place = Place(grid, output, source, dense, thread_count(args))
    try:
        rows = [_row(row, key, place, console) for row, key in zip(grid.rows, keys, strict=True)]
    except KeyboardInterrupt:
        console.info(f"Finished rows are kept in {output}; the same line goes on with the others.")
        raise
    _publish(rows, place, console, as_json=args.json)
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        raise GateError(
            f"{len(failed)} of {len(rows)} rows failed; the first, {failed[0]['name']}: {_reason(failed[0])}",
            hint=f"Logs are in {output / 'logs'}. The same line tries them again and keeps the others.",
            details={"failed_rows": len(failed)},
        )


def _key(row: Row, grid: Grid, record: SourceRecord, text_hash: str, tasks_hash: str) -> str:
    from losa_deploy.benchmarks.grid import row_key

    return row_key(row, grid, record.files, text_hash, tasks_hash)


def _text_hash(grid: Grid) -> str:
    from losa_deploy.manifest import sha256_file
    from losa_deploy.verify.questions import evaluation_text

    if grid.text == "builtin":
        return hashlib.sha256(evaluation_text(grid.text).encode()).hexdigest()
    if not Path(grid.text).is_file():
        raise InputError(f"There is no text {grid.text}.", hint="Paths in a grid are relative to its file.")
    return sha256_file(Path(grid.text))


def _tasks_hash(grid: Grid) -> str:
    """Of the rows that are asked; raises before any work if they or lm-eval are missing."""
    if not grid.tasks or grid.task_rows is None:
        return ""
    from losa_deploy.benchmarks.task_rows import task_rows
    from losa_deploy.benchmarks.tasks import require_lm_eval

    require_lm_eval()
    rows = {name: task_rows(Path(grid.task_rows), name, grid.limit) for name in grid.tasks}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _dense_gguf(
    grid: Grid, keys: Sequence[str], source: Checkpoint, record: SourceRecord, output: Path
) -> Path | None:
    """The F16 file that peers are made of, if one of them is still to be made."""
    from losa_deploy.benchmarks.gguf_peers import dense_gguf
    from losa_deploy.benchmarks.grid import PeerRow

    waiting = [
        row
        for row, key in zip(grid.rows, keys, strict=True)
        if isinstance(row, PeerRow) and _finished(output / "rows" / f"{key}.json") is None
    ]
    return dense_gguf(source, record, output / "work") if waiting else None


def _finished(path: Path) -> dict[str, object] | None:
    """The record of a row that is done, None for one that is not, or failed, or was not written whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("status") == "ok" else None


def _row(row: Row, key: str, place: Place, console: Console) -> dict[str, object]:
    """The record of a row: as it was stored, or made, measured and stored now."""
    from losa_deploy.output import remove

    done = _finished(place.result(key))
    if done is not None:
        console.info(f"{row.name}: measured before, kept ({place.result(key)})")
        return done
    console.info(f"{row.name}: making and measuring it …")
    record: dict[str, object] = {"schema": ROW_SCHEMA, "key": key, "name": row.name}
    record["row"] = row.model_dump(mode="json")
    folder = place.shared / key
    folder.mkdir(exist_ok=True)
    try:
        record |= {"status": "ok", **_measure(row, folder, place, place.output / "logs" / f"{key}.log")}
    except LosaError as error:
        record |= {"status": "failed", "error": error.to_json()}
        console.warn(f"{row.name} failed: {error.message}")
    path = place.result(key)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    partial.rename(path)
    if record["status"] == "ok":
        remove(folder)
    return record


def _measure(row: Row, folder: Path, place: Place, log: Path) -> dict[str, object]:
    """Make a row, evaluate it, and open it once more in a fresh process for its memory."""
    from losa_deploy.benchmarks.memory import measure_footprint

    job, result = folder / "job.json", folder / "made.json"
    whole = RowJob(
        row.model_dump(mode="json"),
        place.grid.model,
        str(place.shared),
        str(place.dense) if place.dense else None,
        str(folder),
        place.threads,
        os.getpid(),
    )
    job.write_text(json.dumps(dataclasses.asdict(whole)), "utf-8")
    start = time.perf_counter()
    _child(["losa_deploy.cli.bench_row", str(job), str(result)], row.name, log)
    made = Made(**json.loads(result.read_text("utf-8")))
    between = time.perf_counter()
    evaluation = json.loads(_child(_evaluate(row, made, place), row.name, log))
    seconds = {"make_seconds": between - start, "evaluate_seconds": time.perf_counter() - between}
    foot = measure_footprint(evaluation["runtime"], Path(made.path), threads=place.threads)
    facts: dict[str, object] = {k: v for k, v in dataclasses.asdict(made).items() if k != "path"}
    facts |= {key: evaluation[key] for key in COPIED if key in evaluation}
    return {**facts, **seconds, "run_peak_rss_bytes": foot.peak_rss_bytes, "evaluation": evaluation}


def _evaluate(row: Row, made: Made, place: Place) -> list[str]:
    """The arguments of `losa-deploy evaluate`; the dense row is not compared with itself."""
    from losa_deploy.benchmarks.grid import DenseRow

    grid = place.grid
    words = ["losa_deploy", "evaluate", "-m", made.path, "--text", grid.text, "--json", "--quiet"]
    words += ["--threads", str(place.threads)]
    words += [] if isinstance(row, DenseRow) else ["--dense", str(place.source.folder)]
    flags = {"--window": grid.window, "--text-tokens": grid.text_tokens}
    if grid.tasks:
        flags |= {"--limit": grid.limit}
        words += ["--tasks", ",".join(grid.tasks), "--task-rows", str(grid.task_rows)]
    return words + [word for flag, value in flags.items() if value for word in (flag, str(value))]


def _child(arguments: Sequence[str], name: str, log: Path) -> str:
    """stdout of `python -m` with these arguments, stderr goes to `log`; `LosaError` if it failed."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with log.open("a", encoding="utf-8") as handle:
        handle.write(done.stderr)
    if done.returncode == 0:
        return done.stdout
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode} without a message"])[-1]
    raise _failure(last, f"The process of {name} failed with exit code {done.returncode}: {last}", log)


def _failure(last: str, otherwise: str, log: Path) -> LosaError:
    """The error that a child wrote as its last line, with its code; else one that says `otherwise`."""
    try:
        document = json.loads(last)
        error = LosaError(str(document["message"]), hint=str(document["hint"]))
        error.code, error.exit_code = str(document["code"]), int(document["exit_code"])
    except (ValueError, TypeError, KeyError):
        return LosaError(otherwise, hint=f"See {log}.")
    return error


def _reason(row: Mapping[str, object]) -> str:
    error = row.get("error")
    return str(cast("Mapping[str, object]", error)["message"]) if isinstance(error, Mapping) else "unknown"


def _publish(rows: Sequence[Mapping[str, object]], place: Place, console: Console, *, as_json: bool) -> None:
    """`results.json`, `table.md` and `quality.svg`, and the result on stdout."""
    from losa_deploy.benchmarks.document import machine_record
    from losa_deploy.benchmarks.grid_table import header, markdown, quality_plot, table_rows

    grid = place.grid.model_dump(mode="json", exclude={"rows"})
    document = {"schema": SCHEMA, "machine": machine_record(), "grid": grid, "rows": [dict(r) for r in rows]}
    files = {
        "results.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        "table.md": markdown(rows, place.grid),
        "quality.svg": quality_plot(rows),
    }
    for name, text in files.items():
        (place.output / name).write_text(text, "utf-8")
    if as_json:
        console.result_json(document)
        return
    console.result(table(header(rows), table_rows(rows)))
    for row in rows:
        if row["status"] != "ok":
            console.result(f"{row['name']} failed: {_reason(row)}")
    console.result(str(place.output))
