"""The plug-in holds weights in huge pages, those of packed files and those that it packs, and only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.decoder import Geometry
from losa_deploy.benchmarks.synthetic.tensors import Storage
from losa_deploy.gguf.view import write_expanded

pytest.importorskip("llama_cpp")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this system gives programs no huge pages"
)
GEOMETRY = Geometry("wide", 1024, 4096, 1, 16, 4, 64)
"""One block of 15.2 million weights, in blobs of 0.2 to 2 MB."""

Run = Callable[..., dict[str, int | str]]
PROGRAM = """
from pathlib import Path
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime

before = pages()["huge"]
session = LlamaCppRuntime().open(Path(sys.argv[1]), threads=1)
logits = session.logits([3, 1, 4, 1, 5])
found = pages()
found["huge"] -= before
session.close()
left = pages()["huge"] - before
print(json.dumps(found | {"left": left, "logits": logits.tobytes().hex()}))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of 2:4 i4, 3.1 bits per weight."""
    folder = tmp_path_factory.mktemp("huge") / "packed"
    ggufs.build_ours(GEOMETRY, Storage("tiled", "i4", 0.5, (2, 4)), folder, seed=1)
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def dense(packed: Path) -> Path:
    """The same weights as F32, which are packed while they load."""
    path = packed.parent.with_name("dense") / "model.gguf"
    path.parent.mkdir()
    write_expanded(packed, path)
    return path


def run_program(pages: str, model: Path, **environment: str) -> dict[str, int | str]:
    done = subprocess.run(
        [sys.executable, "-c", pages + PROGRAM, str(model), "model.gguf"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int | str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def run(memory_pages: str) -> Run:
    """The program with a model → what it measured."""
    return partial(run_program, memory_pages)


def test_blobs_of_packed_files_move_and_are_in_memory_once(run: Run, packed: Path) -> None:
    blobs = GEOMETRY.block_weights * 3.1 / 8
    kept, moved = run(packed, LOSA_HUGE_PAGES="0"), run(packed)
    assert kept["huge"] == 0 and int(kept["file"]) >= 0.9 * blobs
    assert int(moved["huge"]) >= 0.7 * blobs, "the machine may have no free huge page"
    assert int(moved["file"]) < 0.1 * blobs, "the pages of the file are still there"
    assert moved["left"] == 0, "a closed session keeps its weights"
    assert moved["logits"] == kept["logits"]


def test_weights_that_are_packed_at_load_lie_there_too(run: Run, dense: Path) -> None:
    weights = GEOMETRY.block_weights * 17 / 8  # half of them, and a mask
    kept, moved = run(dense, LOSA_HUGE_PAGES="0"), run(dense)
    assert kept["huge"] == 0
    assert int(moved["huge"]) >= 0.7 * weights, "the machine may have no free huge page"
    assert moved["left"] == 0, "a closed session keeps its weights"
    assert moved["logits"] == kept["logits"]
