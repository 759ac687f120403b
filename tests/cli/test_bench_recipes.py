"""`bench recipes`: a grid of tiny models, stopped, resumed, with a row that fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGUFReader

from losa_deploy.layouts import LAYOUTS, VALUE_TYPES

from .test_pipeline import losa

SHORT = """
calibration.samples: 8
calibration.sequence_length: 32
allocation.samples: 4
schedule.steps: 1
adapt: {mode: none}
"""
ROW_KEYS = {
    "key",
    "name",
    "row",
    "status",
    "runtime",
    "perplexity",
    "perplexity_stderr",
    "bytes",
    "block_bytes",
    "block_bits_per_weight",
    "sparsity",
    "make_seconds",
    "evaluate_seconds",
    "make_peak_rss_bytes",
    "run_peak_rss_bytes",
    "evaluation",
}


def recipe(text: str = "") -> str:
    return "{" + ", ".join(f"{line}" for line in (SHORT + text).strip().splitlines()) + "}"


def grid(folder: Path, model: Path, text: str, *rows: str) -> Path:
    """A grid file; the text lies beside it."""
    (folder / "notes.txt").write_text(text, "utf-8")
    path = folder / "grid.yaml"
    head = [f"model: {model}", "text: notes.txt", "window: 64", "text_tokens: 256", "rows:"]
    path.write_text("\n".join([*head, *(f"- {row}" for row in rows)]) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


HALF = f"{{name: half, recipe: {recipe()}}}"
ONNX = f"{{name: onnx, format: onnx, recipe: {recipe('sparsity.pattern: 2:4')}}}"
PEER = "{name: Q4_0, peer: q4_0}"
DENSE = "{name: dense, dense: f32}"
BROKEN = f"{{name: broken, recipe: {recipe('calibration.source: nowhere.txt')}}}"


@pytest.fixture(scope="module")
def finished(
    tiny_llama: Path, tiny_text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, str, str]:
    """A grid of five rows, one of which fails: its file, and exit code and streams of the first run."""
    path = grid(tmp_path_factory.mktemp("grid"), tiny_llama, tiny_text, HALF, ONNX, PEER, BROKEN, DENSE)
    result = losa("bench", "recipes", path, "--threads", "1", "--json")
    return path, result.code, result.out, result.err


@pytest.mark.slow
def test_a_grid_gives_one_record_per_row(finished: tuple[Path, int, str, str]) -> None:
    path, code, out, err = finished
    assert code == 6, err
    document = json.loads(out)
    assert document["schema"] == "losa.grid/1" and document["machine"]["cores"] > 0
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == ["half", "onnx", "Q4_0", "broken", "dense"]
    for name in ("half", "onnx", "Q4_0", "dense"):
        assert set(rows[name]) >= ROW_KEYS, name
        assert rows[name]["status"] == "ok" and rows[name]["make_peak_rss_bytes"] > 10_000_000
    assert [rows[n]["runtime"] for n in ("half", "onnx", "Q4_0")] == ["reference", "ort", "llamacpp"]
    assert rows["half"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert rows["half"]["kl_to_dense"] > rows["Q4_0"]["kl_to_dense"] > 0
    assert "kl_to_dense" not in rows["dense"]
    assert rows["dense"]["perplexity"] == pytest.approx(rows["Q4_0"]["evaluation"]["dense_perplexity"])
    assert rows["dense"]["block_bits_per_weight"] == 32.0
    assert 4.5 <= rows["Q4_0"]["block_bits_per_weight"] < 5
    # Quantizing does not load torch, whose size is no matter of the file.
    assert rows["Q4_0"]["make_peak_rss_bytes"] < 0.9 * rows["dense"]["make_peak_rss_bytes"]
    output = path.with_name("grid.results")
    assert json.loads((output / "results.json").read_text()) == document


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_the_others_go_on(finished: tuple[Path, int, str, str]) -> None:
    path, _, out, err = finished
    broken = json.loads(out)["rows"][3]
    assert broken["status"] == "failed" and broken["error"]["exit_code"] == 3
    assert "nowhere.txt" in broken["error"]["message"]
    error = json.loads(err.strip().splitlines()[-1])
    assert error["exit_code"] == 6 and "1 of 5 rows failed; the first, broken: " in error["message"]
    table = (path.with_name("grid.results") / "table.md").read_text()
    assert "| broken | failed |" in table and "Failed:" in table and "| Q4_0 | " in table
    plot = (path.with_name("grid.results") / "quality.svg").read_text()
    assert plot.count("<circle") == 4 and ">Q4_0<" in plot and ">broken<" not in plot


@pytest.mark.slow
def test_a_second_run_keeps_what_is_finished(finished: tuple[Path, int, str, str], tmp_path: Path) -> None:
    path, _, out, _ = finished
    for name in ("grid.yaml", "notes.txt"):
        shutil.copy(path.with_name(name), tmp_path / name)
    shutil.copytree(path.with_name("grid.results"), tmp_path / "grid.results")
    again = tmp_path / "grid.yaml"
    again.write_text(again.read_text().replace(f"- {BROKEN}\n", ""))
    result = losa("bench", "recipes", again, "--threads", "1")
    assert result.code == 0, result.err
    assert result.err.count("measured before, kept") == 4
    lines = result.out.splitlines()
    assert lines[0].split()[:3] == ["row", "perplexity", "KL"]
    assert [line.split()[0] for line in lines[1:5]] == ["half", "onnx", "Q4_0", "dense"]
    assert lines[-1] == str(tmp_path / "grid.results")
    kept = {row["name"]: row for row in json.loads(out)["rows"]}
    for row in json.loads((tmp_path / "grid.results" / "results.json").read_text())["rows"]:
        assert row == kept[row["name"]]


@pytest.mark.slow
def test_another_text_or_window_is_another_row(finished: tuple[Path, int, str, str], tmp_path: Path) -> None:
    from losa_deploy.benchmarks.grid import read_grid, row_key

    found = read_grid(finished[0])
    key = row_key(found.rows[0], found, {"a": "b"}, "text", "")
    others = [
        row_key(found.rows[1], found, {"a": "b"}, "text", ""),
        row_key(found.rows[0], found, {"a": "c"}, "text", ""),
        row_key(found.rows[0], found, {"a": "b"}, "other", ""),
        row_key(found.rows[0], found.model_copy(update={"window": 32}), {"a": "b"}, "text", ""),
    ]
    assert len({key, *others}) == 5
    moved = found.model_copy(update={"text": "elsewhere.txt"})
    assert row_key(found.rows[0], moved, {"a": "b"}, "text", "") == key


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_missing_rows(tiny_llama: Path, tiny_text: str, tmp_path: Path) -> None:
    path = grid(tmp_path, tiny_llama, tiny_text, DENSE, "{name: Q8_0, peer: q8_0}")
    command = [sys.executable, "-m", "losa_deploy", "bench", "recipes", str(path), "--threads", "1"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    rows = tmp_path / "grid.results" / "rows"
    deadline = time.monotonic() + 120
    while not list(rows.glob("*.json")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    first = {file.name: file.read_bytes() for file in rows.glob("*.json")}
    assert len(first) == 1
    result = losa("bench", "recipes", path, "--threads", "1")
    assert result.code == 0, result.err
    assert result.err.count("measured before, kept") == 1
    assert len(list(rows.glob("*.json"))) == 2
    assert all((rows / name).read_bytes() == content for name, content in first.items())


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ("[]", "no list `rows`"),
        ("[{name: a, peer: q5_9}]", "known: q4_0"),
        ("[{name: a, recipe: {sparsity: {goal: 0.5}}}]", "sparsity.goal"),
        ("[{name: a, preset: fast}]", "Unknown preset 'fast'"),
        ("[{name: a, dense: f32}, {name: a, peer: q4_0}]", "two rows called 'a'"),
        ("[{name: a, peers: q4_0}]", "peers"),
        ("[3]", "row 1 is 3"),
    ],
)
def test_a_grid_that_cannot_be_used_is_refused_before_any_work(tmp_path: Path, rows: str, word: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(f"rows: {rows}\n", "utf-8")
    result = losa("bench", "recipes", path)
    assert result.code == 2 and word in result.err, result.err
    assert not (tmp_path / "grid.results").exists()


def test_flags_and_words_that_say_nothing_here_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("rows: [{name: a, dense: f32}]\ntext: none.txt\n", "utf-8")
    for argv, code, word in (
        (("recipes",), 2, "takes one grid"),
        (("recipes", path, "--sparsity", "0.5"), 2, "--sparsity says nothing"),
        (("somewhere", "--output", tmp_path), 2, "--output says nothing"),
        (("recipes", path), 3, "no text none.txt"),
        (("recipes", tmp_path / "none.yaml"), 2, "Cannot read the grid"),
    ):
        result = losa("bench", *argv)
        assert (result.code, word in result.err) == (code, True), result.err


@pytest.mark.parametrize("value_type", ["i4", "i3"])
def test_the_peer_of_our_own_is_dense_and_packed(value_type: str, tiny_llama: Path, tmp_path: Path) -> None:
    from losa_deploy.benchmarks.gguf_peers import dense_gguf, make_peer
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.sources.checkpoint import Checkpoint

    source = Checkpoint.open(tiny_llama)
    dense = dense_gguf(source, SourceRecord(id="tiny", files={"a": "b"}), tmp_path)
    path = make_peer(f"ours-dense-{value_type}", dense, lambda: source, tmp_path, 1)
    blobs = [t for t in GGUFReader(path).tensors if t.name.startswith("losa.blk.")]
    assert len(blobs) == 3 * 7
    headers = {tuple(blob.data.view("uint8")[8:10]) for blob in blobs}
    assert headers == {(LAYOUTS["dense"].number, VALUE_TYPES[value_type].number)}
    assert sorted(p.name for p in tmp_path.iterdir()) == [dense.parent.name, path.name]
