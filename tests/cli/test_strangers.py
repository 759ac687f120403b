"""A format and a runtime from another package go the whole way, found by their entry points alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Losa = Callable[..., subprocess.CompletedProcess[str]]
Document = dict[str, Any]
MINIMAL = ["--samples", "4", "--sequence-length", "32", "--steps", "1", "--adapt", "none", "--rival", "none"]
MINIMAL += ["--allocation", "uniform", "--prune-method", "magnitude", "--value-type", "f32"]
MINIMAL += ["--text-tokens", "64", "--window", "32", "--threads", "1", "--offline"]


@pytest.fixture(scope="module")
def losa(tmp_path_factory: pytest.TempPathFactory) -> Losa:
    """Runs a command line in a process that has the package `acme-npz`."""
    package = tmp_path_factory.mktemp("acme")
    shutil.copy(Path(__file__).with_name("acme_npz.py"), package / "acme_npz.py")
    info = package / "acme_npz-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-npz\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[losa_deploy.exporters]\nnpz = acme_npz:NpzExporter\n"
        "[losa_deploy.runtimes]\nnpz = acme_npz:NpzRuntime\n"
    )
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))

    def run(*argv: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "losa_deploy", *map(str, argv)]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def finished(
    losa: Losa, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Document, Document]:
    """The artifact, what its dry run estimated, and its report."""
    output = tmp_path_factory.mktemp("npz") / "out"
    whole = ["compress-and-export", "-m", tiny_llama, "-f", "npz", "-o", output, *MINIMAL, "--json"]
    return output, result(losa(*whole, "--dry-run")), result(losa(*whole))


def result(done: subprocess.CompletedProcess[str]) -> Document:
    """The JSON document of a command that succeeded."""
    assert done.returncode == 0, done.stderr
    found: Document = json.loads(done.stdout)
    return found


def test_a_strangers_format_is_written_verified_and_reported(
    losa: Losa, finished: tuple[Path, Document, Document]
) -> None:
    output, _, report = finished
    assert report["format"] == "npz" and report["parity"]["ok"]
    assert report["exported"]["runtime"] == report["dense"]["runtime"] == "npz"
    card = (output / "README.md").read_text("utf-8")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "numpy"
    assert "NumPy opens `weights.npz`." in card and "- It is as large as the dense model." in card
    verified = losa("verify", output)
    assert verified.returncode == 0, verified.stderr


def test_its_plan_is_what_inspect_finds(losa: Losa, finished: tuple[Path, Document, Document]) -> None:
    output, expected, _ = finished
    plan = result(losa("export", f"{output}.work/merged", "-f", "npz", "--dry-run", "--json"))
    found = result(losa("inspect", output, "--json"))
    stored = {t["name"]: (t["layout"], t["bytes"], t["nnz"]) for t in found["tensors"]}
    assert stored == {t["name"]: (t["layout"], t["bytes"], t["nnz"]) for t in plan["tensors"]}
    assert {tensor["name"] for tensor in expected["tensors"]} == set(stored)
    assert abs(plan["files"]["weights.npz"] - (output / "weights.npz").stat().st_size) < 4096


def test_bench_finds_its_runtime_and_its_baseline(
    losa: Losa, finished: tuple[Path, Document, Document]
) -> None:
    output, _, _ = finished
    load = ["--prompt-tokens", "4", "--decode-tokens", "4", "--repetitions", "1", "--threads", "1"]
    bench = result(losa("bench", output, *load, "--json"))
    labels = [(model["name"], model["runtime"]) for model in bench["results"]]
    assert labels == [(f"dense {output}.work/dense-npz", "npz"), (str(output), "npz")]


def test_a_foreign_weight_file_is_found_by_the_suffix_of_its_format(
    losa: Losa, finished: tuple[Path, Document, Document]
) -> None:
    for folder in (finished[0], Path(f"{finished[0]}.work/merged")):
        extra = folder / "extra.npz"
        extra.write_bytes(b"")
        found = losa("verify", folder)
        extra.unlink()
        assert found.returncode == 6
        assert "extra.npz: found a weight file that losa.json does not list" in found.stderr
