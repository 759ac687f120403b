"""The kernel table on a small matrix: every row, the document, the plot, the errors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from losa_deploy import _native
from losa_deploy.benchmarks.kernels import table as kernels
from losa_deploy.benchmarks.kernels.deepsparse_peer import measure_deepsparse
from losa_deploy.benchmarks.kernels.roofline import check_plot, plot, plotted_rows
from losa_deploy.benchmarks.kernels.table import KernelPlan, default_storages, measure_kernels
from losa_deploy.benchmarks.synthetic.tensors import (
    Storage,
    layout_of_pattern,
    native_description,
    random_packed,
)
from losa_deploy.cli.main import main
from losa_deploy.errors import MissingError, UsageError
from losa_deploy.layouts import PackOptions, choose

SMALL = ("--rows", "64", "--columns", "256", "--seconds", "0.2", "--threads", "1")


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory is read, so that the test is quick."""
    monkeypatch.setattr(kernels, "DEFAULT_CACHE_BYTES", 1 << 18)
    monkeypatch.setattr(kernels, "CACHES", Path("/nonexistent"))
    monkeypatch.setattr(kernels, "BANDWIDTH_SECONDS", 0.001)


def test_the_read_rate_is_a_plausible_number() -> None:
    one = _native.read_bandwidth(1 << 22, 1, 0.02)
    assert 1e8 < one < 1e13
    assert _native.read_bandwidth(1 << 22, 3, 0.02) > 1e8
    with pytest.raises(ValueError, match="64 KiB"):
        _native.read_bandwidth(10, 1, 0.01)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_timer_gives_one_time_per_pass(threads: int) -> None:
    packed = random_packed((72, 200), Storage("bitmask", "i4", 0.6))
    timer = _native.MatmulTimer([native_description(packed), native_description(packed)])
    for tokens, rows in ((1, 0), (5, 72), (2, 16)):
        seconds = timer.time(tokens, threads, 4, rows)
        assert len(seconds) == 4
        assert all(0 < value < 1 for value in seconds)


def test_the_timer_refuses_what_does_not_belong_together() -> None:
    packed = random_packed((16, 128), Storage("bitmask", "i8", 0.5))
    other = random_packed((16, 128), Storage("bitmask", "i8", 0.5), seed=1)
    with pytest.raises(ValueError, match="have to be equal"):
        _native.MatmulTimer([native_description(packed), native_description(other)])
    with pytest.raises(ValueError, match="needs a tensor"):
        _native.MatmulTimer([])
    with pytest.raises(ValueError, match="LOSA_ROW_STEP"):
        _native.MatmulTimer([native_description(packed)]).time(1, 1, 1, 3)
    broken = native_description(packed)
    broken["values"] = np.zeros(3, np.uint8)
    with pytest.raises(RuntimeError):
        _native.MatmulTimer([broken])


def test_default_rows_cover_layouts_types_and_sparsities() -> None:
    found = default_storages(["dense", "bitmask", "pair", "sliding", "1:4"], ["f16", "i8", "i4"], [0.5, 0.7])
    assert len(found) == 2 * (1 + 2 + 2 + 1 + 1) + (1 + 2 + 1)  # f16 has no windows, and stores each mask
    assert Storage("bitmask", "i4", 0.7, paired=True) in found
    assert Storage("sliding", "i4", 0.5) in found
    assert Storage("tiled", "i4", 0.75, (1, 4)) in found


@pytest.mark.parametrize("value_type", ["f16", "i8", "i4"])
def test_patterns_are_stored_as_an_export_stores_them(value_type: str) -> None:
    for n, m in [(1, 4), (2, 4), (3, 4), *((n, 16) for n in range(1, 16))]:
        order = np.random.default_rng(n).random((32, 128 // m, m)).argsort(axis=2)
        mask = (order < n).reshape(32, 128)
        chosen = choose(mask, PackOptions(value_type))
        if chosen.options.pattern is None or chosen.options.pattern[1] == m:  # no shorter pattern by chance
            tiled = chosen.layout == "tiled"
            assert (layout_of_pattern((n, m), value_type) == "tiled") == tiled, (n, m)


def test_every_case_is_sampled_in_every_round(small_caches: None) -> None:
    targets = tuple(_native.targets())
    plan = KernelPlan(
        64, 256, default_storages(["bitmask", "2:4"], ["i8"], [0.6]), targets, (1, 2), (1, 4), seconds=0.2
    )
    chosen = _native.target_name()
    table = measure_kernels(plan)
    assert _native.target_name() == chosen
    assert len(table.rows) == 2 * len(targets) * 2 * 2
    assert all(len(row.passes) >= kernels.ROUNDS for row in table.rows)
    assert set(table.read_bandwidth) == {1, 2}
    record = table.record(table.rows[0])
    share = float(str(record["bytes_per_second"])) / float(str(record["read_bandwidth_bytes_per_second"]))
    assert record["share_of_read_bandwidth"] == pytest.approx(share)
    stored = table.rows[0].packed_bytes
    assert record["bits_per_weight"] == pytest.approx(8 * stored / (64 * 256))


def test_the_command_prints_rows_with_the_fixed_names(
    small_caches: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "kernels", *SMALL, "--layouts", "dense,bitmask,pair,2:4", "--value-types", "i8,i4"]
    argv += ["--sparsity", "0.5", "0.7", "--tokens", "1", "3", "--targets", _native.targets()[0]]
    code = main([*argv, "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    document = json.loads(streams.out)
    assert document["schema"] == "losa.bench/1"
    assert len(document["results"]) == 2 * (1 + 2 + 2 + 1) * 2
    for row in document["results"]:
        assert row["weights_per_second"] > 0 and row["bytes_per_second"] > 0
        assert row["read_bandwidth_bytes_per_second"] > 0
        assert row["target"] == _native.targets()[0] and row["threads"] == 1
        assert row["layout"] in ("dense", "bitmask", "tiled") and row["samples"]
    assert main([*argv, "--quiet"]) == 0
    assert "G weights/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layouts", "bitmsk"], "Did you mean `--layouts bitmask`"),
        (["--layouts", "8:4"], "no pattern N:M"),
        (["--value-types", "i2"], "There is no value type 'i2'"),
        (["--targets", "sse"], "target that this CPU can run"),
        (["--sparsity", "1.0"], "no fraction"),
        (["--seconds", "0"], "--seconds has to be more than 0"),
        (["--peers", "ort-int4"], "--peers says nothing about `bench kernels`"),
    ],
)
def test_errors_say_what_to_type_next(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_plot_needs_matplotlib_and_a_known_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs matplotlib"):
        check_plot(tmp_path / "roofline.svg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="no known kind"):
        check_plot(tmp_path / "roofline.doc")
    with pytest.raises(UsageError, match="no folder"):
        check_plot(tmp_path / "missing" / "roofline.svg")


def test_the_roofline_shows_single_tokens_on_the_fastest_target(small_caches: None, tmp_path: Path) -> None:
    storages = default_storages(["dense", "bitmask", "2:4"], ["i8"], [0.6])
    table = measure_kernels(
        KernelPlan(64, 256, storages, tuple(_native.targets()), (1, 2), (1, 4), seconds=0.1)
    )
    rows = plotted_rows(table)
    assert [row.storage for row in rows] == list(storages)
    assert all(row.threads == 2 and row.tokens == 1 for row in rows)
    pytest.importorskip("matplotlib")
    for name in ("roofline.svg", "roofline.png"):
        plot(table, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_a_python_without_deepsparse_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="cannot be measured"):
        measure_deepsparse(Path(sys.executable), (8, 8), [0.5], [1], [1])
    with pytest.raises(MissingError, match="No such file"):
        measure_deepsparse(tmp_path / "python", (8, 8), [0.5], [1], [1])
