"""`losa-deploy` under a launcher: one process speaks, only `compress` runs in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ("--samples", "6", "--sequence-length", "16", "--set", "phases.0.tokens=64", "--threads", "1")


def launched(*arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, "-m", "losa_deploy", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_write_one_result(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapted"
    done = launched("compress", "--model", str(tiny_llama), "--output", str(output), *SHORT, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["folder"] == str(output)  # one document, not two
    assert "for each process" in done.stderr
    assert done.stderr.count(f"Output: {output}") == 1
    assert "process 1 of 2" not in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [
        "calibration.safetensors",
        "state.json",
        "step-01",
    ]


@pytest.mark.slow
def test_other_commands_and_bad_input_are_refused_once(tiny_llama: Path, tmp_path: Path) -> None:
    refused = launched("verify", str(tmp_path))
    assert refused.returncode != 0
    assert refused.stderr.count("verify runs in one process, a launcher started 2") == 1
    few = launched(
        "compress", "--model", str(tiny_llama), "--output", str(tmp_path / "a"), *SHORT, "--samples", "1"
    )
    assert few.returncode != 0
    assert few.stderr.count("2 processes cannot share 1 calibration samples") == 1
    assert not (tmp_path / "a").exists()
