"""What the product is compiled from: sources and headers of `native/`, none of the tests."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE, TESTS = ROOT / "native", ROOT / "tests"
FOLDER_FLAGS = ("-I", "-isystem", "-iquote")
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def folders(options: list[str]) -> list[str]:
    """Where a compiler looks for headers, and what it includes unasked."""
    found = [option[2:] for option in options if option.startswith("-I") and option != "-I"]
    return found + [value for flag, value in pairwise(options) if flag in (*FOLDER_FLAGS, "-include")]


def test_no_product_is_compiled_with_the_tests_in_sight(tmp_path: Path) -> None:
    tool = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    configure = [tool, "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(configure, capture_output=True, check=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text("utf-8"))
    assert {Path(entry["file"]).parent.name for entry in commands} >= {"kernels", "format", "ort", "ggml"}
    for entry in commands:
        assert Path(entry["file"]).is_relative_to(NATIVE)
        seen = folders(shlex.split(entry["command"]))
        assert seen
        for folder in seen:
            place = (Path(entry["directory"]) / folder).resolve()
            assert not TESTS.is_relative_to(place) and not place.is_relative_to(TESTS), entry["command"]


def test_headers_are_named_from_the_root_or_their_own_folder() -> None:
    sources = [path for end in ("*.h", "*.cpp") for path in NATIVE.rglob(end)]
    assert sources
    for path in sources:
        for name in INCLUDE.findall(path.read_text("utf-8")):
            homes = (path.parent, NATIVE, NATIVE / "include")
            assert ".." not in Path(name).parts, f"{path}: {name}"
            assert any((home / name).is_file() for home in homes), f"{path}: {name}"
