"""The measuring stage on the tiny model, in the reference runtime: real sessions, real processes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from losa_deploy.benchmarks.memory import measure_footprint
from losa_deploy.benchmarks.report.assemble import Job, dense_same_type_bytes
from losa_deploy.benchmarks.report.document import Report
from losa_deploy.benchmarks.report.measure import measure
from losa_deploy.benchmarks.report.render import bar, markdown
from losa_deploy.benchmarks.rival import RivalFile, rival_file
from losa_deploy.benchmarks.workloads import Workload
from losa_deploy.errors import LosaError
from losa_deploy.interfaces import Exporter
from losa_deploy.manifest import Manifest
from losa_deploy.model import SparseModel
from losa_deploy.recipe import load_recipe
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.verify.judge import Parity

PARITY = Parity(
    ok=True,
    reasons=(),
    max_abs_logit_difference=0.25,
    greedy_tokens_equal=False,
    ties=("prompt 'x': found token 3 at step 2",),
    decoded_logit_difference=1e-6,
    decoded_logit_tolerance=1e-4,
    mean_kl=0.001,
    same_top_rate=0.99,
    positions=200,
)


def job(source: Path, merged: Path, exported: Path, exporter: Exporter, work: Path, *, dense: bool) -> Job:
    overrides = [("verify.window", 64), ("verify.max_tokens", 256), ("sparsity.pattern", "16:32")]
    return Job(
        source=Checkpoint.open(source) if dense else None,
        model=SparseModel.open(merged),
        exported=exported,
        exporter=exporter,
        runtime=ReferenceRuntime(),
        work=work,
        recipe=load_recipe(overrides=overrides),
        threads=1,
        workload=Workload("tiny", prompt_tokens=8, decode_tokens=4, samples=3),
    )


@pytest.fixture(scope="module")
def measured(
    tiny_llama: Path,
    merged_half: Path,
    exported_half: Path,
    folder_exporter: Exporter,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Report, Path]:
    work = tmp_path_factory.mktemp("work")
    told: list[tuple[int, int, str]] = []
    task = job(tiny_llama, merged_half, exported_half, folder_exporter, work, dense=True)
    report = measure(task, PARITY, timings={"compress": 1.5}, progress=lambda *step: told.append(step))
    assert told[0][0] == 0 and told[-1] == (10, 10, "done")
    assert [step[0] for step in told] == sorted(step[0] for step in told)
    return report, work


def test_the_report_has_the_fields_scripts_rely_on(measured: tuple[Report, Path], tmp_path: Path) -> None:
    report, _ = measured
    report.write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert found["schema"] == "losa.report/1"
    assert found["model"] == "someone/tiny"
    assert found["recipe"]["sparsity"]["pattern"] == "16:32"
    assert found["sparsity"] == {"target": 0.5, "achieved": 0.5, "pattern": "16:32"}
    assert {"ok", "support_equal", "max_abs_logit_difference", "cast_error"} <= set(found["merge_proof"])
    assert found["parity"]["greedy_tokens_equal"] is False
    speeds = {"decode_tokens_per_second", "prefill_tokens_per_second", "peak_rss_bytes", "load_seconds"}
    every = {"size_bytes", "bits_per_weight", "perplexity", "perplexity_stderr"}
    assert every | speeds <= set(found["dense"]) and every | speeds <= set(found["exported"])
    assert every <= set(found["merged"]) and not speeds & set(found["merged"])
    assert found["timings"]["compress"] == 1.5 and found["timings"]["speed"] > 0
    assert Report.read(tmp_path) == report


def test_the_numbers_are_of_the_right_models(measured: tuple[Report, Path]) -> None:
    report, work = measured
    assert report.dense.perplexity is not None and report.merged.perplexity is not None
    assert report.exported.perplexity == pytest.approx(report.merged.perplexity, rel=1e-5)
    assert report.dense.perplexity != pytest.approx(report.merged.perplexity, rel=1e-3)
    assert 1.0 < report.dense.perplexity < 1e6 and not math.isnan(report.dense.perplexity)
    assert report.exported.bits_per_weight == 32.0
    assert report.evaluation.window == 64 and report.evaluation.tokens == 256 - 4
    assert len(report.samples["dense"].decode_tokens_per_second) == 3
    assert not report.verdict.smaller
    assert (work / "dense-folder" / "losa.json").is_file()
    assert sorted(path.name for path in work.iterdir()) == [
        "dense-folder",
        "dense-folder.seal",
        "rival-q4_0",
        "rival-q4_0.seal",
    ]


def test_the_dense_baseline_is_the_dense_model_and_is_reused(
    measured: tuple[Report, Path],
    tiny_llama: Path,
    merged_half: Path,
    exported_half: Path,
    folder_exporter: Exporter,
) -> None:
    _, work = measured
    folder = work / "dense-folder"
    name = "model.layers.0.mlp.up_proj.weight"
    assert (Checkpoint.open(folder).array(name) == Checkpoint.open(tiny_llama).array(name)).all()
    before = (folder / "losa.json").stat().st_mtime_ns
    task = job(tiny_llama, merged_half, exported_half, folder_exporter, work, dense=True)
    report = measure(task, None)
    assert (folder / "losa.json").stat().st_mtime_ns == before
    assert report.parity is None and "parity" not in report.to_json()
    assert any("not checked" in row for row in report.table())


def test_without_the_dense_model_its_perplexity_is_left_out(
    tiny_llama: Path, merged_half: Path, exported_half: Path, folder_exporter: Exporter, tmp_path: Path
) -> None:
    task = job(tiny_llama, merged_half, exported_half, folder_exporter, tmp_path, dense=False)
    report = measure(task, PARITY)
    assert report.dense.perplexity is None and report.dense.decode_tokens_per_second is not None
    assert "perplexity" not in report.to_json()["dense"]  # type: ignore[operator]
    assert "dense model was not at hand" in report.verdict.lines[3]


def test_the_table_fits_the_terminal_and_the_markdown_has_bars(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    rows = report.table()
    assert len(rows) <= 13
    labels = [row[0] for row in rows]
    for label in ("size", "sparsity achieved", "perplexity", "decode tokens/s", "peak RSS", "merge proof"):
        assert label in labels
    assert rows[-1] == ("verdict", "", "", "not smaller, " + rows[-1][3].split(", ")[1], "")
    assert report.header() == ("", "dense", "merged", "exported", "Q4_0")
    assert all(len(row) == 5 for row in rows) and all(rows[labels.index("size")][1:])
    assert rows[labels.index("parity")][3] == "ok, 1 tie(s), Δlogit 2.5e-01"
    text = markdown(report)
    assert "  0 " + bar(0.5, 1.0) + " 50.0%" in text
    assert "  2 " + "█" * 30 + " 0.3000" in text
    assert "Adapter rank" not in text
    assert "prompt 'x': found token 3 at step 2" in text
    assert all(line in text for line in report.verdict.lines)


def test_the_rival_is_measured_on_the_same_windows_and_in_the_same_turns(
    measured: tuple[Report, Path], tmp_path: Path
) -> None:
    report, work = measured
    rival = report.rival
    assert rival is not None and rival.numbers is not None and rival.kind == "q4_0"
    path = work / "rival-q4_0" / "q4_0.gguf"
    assert rival.numbers.size_bytes == path.stat().st_size
    assert 4.5 <= rival.numbers.bits_per_weight < 5
    assert rival.numbers.runtime == "llamacpp-stock"
    assert report.dense.perplexity is not None and report.exported.perplexity is not None
    assert rival.numbers.perplexity == pytest.approx(report.dense.perplexity, rel=0.2)
    assert rival.loss_difference == pytest.approx(
        math.log(report.exported.perplexity) - math.log(rival.numbers.perplexity), rel=1e-6
    )
    assert len(report.samples["rival"].decode_tokens_per_second) == 3
    assert rival.numbers.peak_rss_bytes and rival.numbers.peak_rss_bytes > 0
    line = report.verdict.lines[-1]
    assert line.startswith(f"Q4_0 of the same model in llama.cpp: {rival.numbers.size_bytes / 1e6:.1f} MB, ")
    assert f"perplexity {rival.numbers.perplexity:.2f}" in line and "for speed" in line
    assert "## Rival" in markdown(report)
    report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["rival"]["numbers"]["perplexity"] > 1


def test_the_file_of_the_rival_is_reused_unless_a_byte_changed(
    measured: tuple[Report, Path], tiny_llama: Path, exported_half: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(measured[1], work)
    path, source, told = work / "rival-q4_0" / "q4_0.gguf", Checkpoint.open(tiny_llama), []

    def again() -> RivalFile:
        return rival_file(source, exported_half, None, "q4_0", work, 1, told.append)

    before = path.stat().st_mtime_ns
    assert again().path == path and path.stat().st_mtime_ns == before and not told
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert again().path == path and path.read_bytes() == good
    assert "q4_0.gguf changed" in told[0] and len(told) == 1
    assert not list(work.glob("*.partial"))


def test_a_rival_that_cannot_be_had_is_said_to_be_not_measured(
    tiny_llama: Path,
    merged_half: Path,
    exported_half: Path,
    folder_exporter: Exporter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Checkpoint.open(tiny_llama)
    monkeypatch.setattr("losa_deploy.benchmarks.rival.version", lambda: "")
    missing = rival_file(source, exported_half, None, "q4_0", tmp_path, 1, print)
    assert missing.path is None and missing.reason == "llama-cpp-python is not installed"
    assert rival_file(source, exported_half, None, "none", tmp_path, 1, print).reason.startswith(
        "switched off"
    )
    assert not list(tmp_path.iterdir())
    report = measure(job(tiny_llama, merged_half, exported_half, folder_exporter, tmp_path, dense=True), None)
    assert report.rival is not None and report.rival.numbers is None
    assert report.header() == ("", "dense", "merged", "exported")
    assert "not measured, llama-cpp-python is not installed" in report.verdict.lines[-1]
    assert "not measured, llama-cpp-python is not installed" in markdown(report).split("## Rival")[1]


def test_bars() -> None:
    assert bar(0.5, 1.0) == "█" * 15 + "░" * 15
    assert bar(3.0, 1.0) == "█" * 30
    assert bar(1.0, 0.0) == "░" * 30


def test_dense_bytes_of_the_same_type_come_from_shapes(
    exported_half: Path, folder_exporter: Exporter
) -> None:
    manifest = Manifest.read(exported_half)
    assert dense_same_type_bytes(1000, manifest, folder_exporter) == 1000
    packed = manifest.linears[0].model_copy(update={"value_type": "i8", "bytes": 100, "shape": (10, 20)})
    changed = manifest.model_copy(update={"linears": (packed,)})
    assert dense_same_type_bytes(1000, changed, folder_exporter) == 1000 - 100 + 10 * 20 + 10 * 4


def test_a_real_probe_in_a_fresh_process(merged_half: Path) -> None:
    found = measure_footprint("reference", merged_half, prompt_tokens=8, decode_tokens=4, threads=1)
    assert found.peak_rss_bytes > found.before_load_rss_bytes > 0
    assert found.load_seconds > 0 and found.decode_seconds > 0


def test_a_probe_of_a_folder_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(LosaError, match=r"failed with exit code 3: .*not a Hugging Face folder"):
        measure_footprint("reference", tmp_path)


def test_a_dense_model_that_does_not_fit_is_judged_in_torch_and_not_timed(
    measured: tuple[Report, Path],
    tiny_llama: Path,
    merged_half: Path,
    exported_half: Path,
    folder_exporter: Exporter,
    tmp_path: Path,
) -> None:
    task = job(tiny_llama, merged_half, exported_half, folder_exporter, tmp_path, dense=True)
    report = measure(replace(task, memory=100_000), PARITY)
    assert not (tmp_path / "dense-folder").exists()
    assert set(report.samples) <= {"exported", "rival"}
    weights = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert (report.dense.runtime, report.dense.size_bytes) == ("torch", weights)
    assert report.dense.decode_tokens_per_second is None and report.dense.peak_rss_bytes is None
    assert report.dense.perplexity == pytest.approx(measured[0].dense.perplexity, rel=1e-4)
    assert report.verdict.faster is None
    assert "in f32, 0.0 GB can be had" in report.verdict.lines[1]
    assert "speed not compared" in markdown(report)
    report.write(tmp_path)
    assert Report.read(tmp_path) == report


def test_less_text_is_used_where_time_is_short_and_the_report_says_so(
    tiny_llama: Path, merged_half: Path, exported_half: Path, folder_exporter: Exporter, tmp_path: Path
) -> None:
    task = job(tiny_llama, merged_half, exported_half, folder_exporter, tmp_path, dense=True)
    short = task.recipe.verify.model_copy(update={"minutes": 1e-9})
    report = measure(replace(task, recipe=task.recipe.model_copy(update={"verify": short})), PARITY)
    assert (report.evaluation.windows, report.evaluation.windows_asked) == (1, 4)
    assert "1 windows of 64 (of 4: more would take longer than --verify-minutes allows)" in markdown(report)


def test_the_report_says_what_was_not_run_without_kernels(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    assert "(f32 arithmetic allows 0.0001)" in markdown(report)
    assert report.parity is not None
    changes = {"decoded_logit_difference": None, "decoded_logit_tolerance": None}
    parity = report.parity.model_copy(update=changes)
    text = markdown(report.model_copy(update={"parity": parity}))
    assert "without native kernels, in f32, the model does not fit into memory and was not run" in text
