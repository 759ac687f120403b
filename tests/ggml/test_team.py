"""The threads of route b under a thread sanitizer: every piece once, results visible, nobody late."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("team") / "run_team"
    sources = [str(ROOT / name) for name in ("tests/native/run_team.cpp", "native/ggml/team.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'native/ggml'}"]
    done = subprocess.run([compiler, *flags, *sources, "-o", str(path)], capture_output=True, text=True)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8])
def test_every_piece_is_done_once(program: Path, threads: int) -> None:
    done = subprocess.run([str(program), str(threads), "2000"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "39000 of 39000 pieces" in done.stdout
    assert threads < 2 or not done.stdout.endswith(" 0 by helpers\n")
