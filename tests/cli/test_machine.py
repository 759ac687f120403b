"""`--for-this-machine` and `--kernels`: the pattern that the kernels choose, in recipes and plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from losa_deploy import _native
from losa_deploy.cli.main import main

COMMANDS = (("compress",), ("compress-and-export", "-f", "onnx"))


@pytest.fixture(autouse=True)
def same_target() -> Iterator[None]:
    yield
    _native.set_target("")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("flags", "same"),
    [
        (("--kernels", "avx2"), ("--pattern", "sliding")),
        (("--kernels", "neon", "--sparsity", "0.6"), ("--pattern", "6:16")),
        (("--kernels", "avx2", "--bits", "2.2"), ("--pattern", "4:16")),
        (("--kernels", "avx512", "--bits", "2.75"), ("--bits", "2.75")),
        (("--kernels", "avx512", "--sparsity", "0.6"), ("--sparsity", "0.6")),
    ],
    ids=lambda words: " ".join(words),
)
def test_the_recipe_is_that_of_the_pattern(
    command: tuple[str, ...],
    flags: tuple[str, ...],
    same: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run(capsys, *command, *flags, "--print-recipe")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("Pattern for ")
    assert run(capsys, *command, *same, "--print-recipe") == (0, out, "")


@pytest.mark.parametrize(("target", "pattern"), [("scalar", "unstructured"), ("avx2", "sliding")])
def test_this_machine_is_the_target_that_it_runs(
    target: str, pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if target not in _native.targets():
        pytest.skip(f"this CPU has no {target}")
    _native.set_target(target)
    code, out, err = run(capsys, "compress", "--for-this-machine", "--print-recipe", "--json")
    assert code == 0, err
    assert json.loads(out)["sparsity"]["pattern"] == pattern
    assert f"Pattern for {target}: {pattern}; {target} " in err


def test_the_plan_shows_the_layout(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("compress-and-export", "-f", "onnx", "-m", str(tiny_llama), "--kernels", "avx2", "--offline")
    code, out, err = run(capsys, *argv, "--threads", "1", "--dry-run", "--json")
    assert code == 0, err
    assert "Pattern for avx2: sliding; avx2 has no instruction that expands masks" in err
    layouts = {tensor["layout"] for tensor in json.loads(out)["tensors"]}
    assert layouts == {"sliding", "dense"}


@pytest.mark.parametrize("machine", [("--for-this-machine",), ("--kernels", "avx2")], ids=lambda m: m[0])
@pytest.mark.parametrize("how", ["flag", "set", "file"])
def test_a_pattern_beside_it_is_refused(
    machine: tuple[str, ...], how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: {pattern: unstructured}\n")
    given = {
        "flag": ("--pattern", "2:4"),
        "set": ("--set", "sparsity.pattern=unstructured"),
        "file": ("--recipe", str(file)),
    }
    code, out, err = run(capsys, "compress", *machine, *given[how], "--print-recipe")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{machine[0]} chooses the pattern, but sparsity.pattern is given too" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kernels", "sse"), "There are no kernels 'sse'"),
        (("--kernels", "avx2", "--sparsity", "0.3"), "Give --sparsity one of these"),
        (("--kernels", "avx2", "--for-this-machine"), "not allowed with"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_other_mistakes_are_one_line(
    flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "compress", *flags, "--print-recipe")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
