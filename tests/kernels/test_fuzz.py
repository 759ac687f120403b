"""Coverage-guided fuzzing of the loader and the kernels, with sanitizers, in every x86 target.

Half a minute here; run the program longer by hand (tests/native/fuzz_tensor.cpp says how).
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.blob import to_blob

pytestmark = pytest.mark.slow
SECONDS = 30
TYPES: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")
PATTERNS = ((2, 4), (1, 4), (3, 5), (3, 16), (1, 8))
SHAPES = ((3, 70), (2, 256))


def seeds() -> list[bytes]:
    """A small sound tensor of every kind."""
    rng = np.random.default_rng(0)
    found = []
    for value_type, (rows, columns) in itertools.product(TYPES, SHAPES):
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        mask = rng.random((rows, columns)) < 0.4
        for name in ("dense", "bitmask"):
            found.append(to_blob(LAYOUTS[name].pack(weight, mask, PackOptions(value_type, 32))))
        if value_type.startswith("i"):
            shared = np.repeat(mask[::2], 2, axis=0)[:rows]
            options = PackOptions(value_type, 32, rows_per_mask=2)
            found.append(to_blob(LAYOUTS["bitmask"].pack(weight, shared, options)))
        for n, m in PATTERNS:
            fixed = np.arange(columns)[None].repeat(rows, 0) % m < n
            options = PackOptions(value_type, 32, pattern=(n, m))
            found.append(to_blob(LAYOUTS["nm"].pack(weight, fixed, options)))
    for value_type, (n, m) in itertools.product(("i8", "i4"), ((3, 16), (6, 16), (2, 4), (1, 4))):
        weight = rng.standard_normal((16, 80)).astype(np.float32)
        fixed = np.arange(80)[None].repeat(16, 0) % m < n
        found.append(to_blob(LAYOUTS["tiled"].pack(weight, fixed, PackOptions(value_type, 32))))
    for value_type in ("i8", "i4", "i3"):
        weight = rng.standard_normal((16, 80)).astype(np.float32)
        fixed = (
            np.arange(80)[None].repeat(16, 0) % 4 % 3 == 0
        )  # at 0, 3, 4, 7, ... of which each has its window
        found.append(to_blob(LAYOUTS["sliding"].pack(weight, fixed, PackOptions(value_type, 32))))
    return found


def test_half_a_minute_of_fuzzing_finds_nothing(tmp_path: Path, sanitized: Callable[[str], Path]) -> None:
    if shutil.which("clang++") is None:
        pytest.skip("needs clang with libFuzzer")
    program = sanitized("fuzz_tensor")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    blobs = seeds()
    for index, (blob, choice) in enumerate(itertools.product(blobs, range(0, 16, 5))):
        (corpus / str(index)).write_bytes(bytes([choice]) + blob)
    command = [str(program), f"-max_total_time={SECONDS}", "-max_len=8192", "-seed=1", "-rss_limit_mb=4096"]
    done = subprocess.run([*command, str(corpus)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None and int(runs[1]) > 4 * len(blobs), done.stderr[-2000:]
