"""What goes where: stdout, stderr, log."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from losa_deploy.console import Console, table, wants_color
from losa_deploy.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def run_stage(console: Console, total: int = 200) -> str:
    with console.stage("compress") as progress:
        for done in range(total + 1):
            progress(done, total, f"block {done}")
    assert isinstance(console.err, io.StringIO)
    return console.err.getvalue()


def test_without_a_terminal_one_line_per_ten_percent() -> None:
    lines = run_stage(Console(io.StringIO(), io.StringIO())).splitlines()
    assert len(lines) == 11
    assert lines[1] == "compress:  10 % (20/200) block 20"
    assert all("\x1b" not in line for line in lines)


def test_every_part_of_a_stage_counts_from_zero() -> None:
    console = Console(io.StringIO(), err := io.StringIO())
    with console.stage("compress") as progress:
        for part, total in (("sampling", 2), ("pruning", 2), ("tuning", 1)):
            for done in range(total + 1):
                progress(done, total, part)
    assert [line.split()[-1] for line in err.getvalue().splitlines()] == (
        ["sampling"] * 3 + ["pruning"] * 3 + ["tuning"] * 2
    )


def test_on_a_terminal_a_bar(terminal: Terminal) -> None:
    assert "\x1b[" in run_stage(Console(io.StringIO(), terminal))


def test_in_ci_no_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert "\x1b" not in run_stage(Console(io.StringIO(), terminal))


def test_quiet_shows_warnings_and_errors_only() -> None:
    console = Console(io.StringIO(), io.StringIO(), quiet=True)
    console.info("hidden")
    console.detail("hidden")
    console.warn("shown")
    console.error(InputError("broken", hint="fix it"))
    assert run_stage(console) == "warning: shown\nerror: broken fix it\n"


def test_details_need_verbose() -> None:
    for verbose in (False, True):
        console = Console(io.StringIO(), io.StringIO(), verbose=verbose)
        console.detail("layer 3")
        assert isinstance(console.err, io.StringIO)
        assert bool(console.err.getvalue()) is verbose


def test_colour_only_on_a_terminal_that_wants_it(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    for err, color, painted in (
        (terminal, True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        Console(io.StringIO(), err, color=color).warn("x")
        assert ("\x1b[33m" in err.getvalue()) is painted
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_color(False)
    assert not wants_color(True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(False)


def test_json_errors_are_one_document() -> None:
    err = io.StringIO()
    Console(io.StringIO(), err, json=True).error(InputError("two\nlines", details={"tensor": "a"}))
    assert json.loads(err.getvalue())["details"] == {"tensor": "a"}
    err = io.StringIO()
    Console(io.StringIO(), err).error(InputError("two\nlines"))
    assert err.getvalue() == "error: two lines\n"


def test_json_results_refuse_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Console(io.StringIO(), io.StringIO()).result_json({"loss": float("nan")})


def test_captured_takes_python_and_c_output_but_not_ours(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console = Console(sys.stdout, sys.stderr)
    with console.captured(tmp_path / "work" / "export.log"):
        sys.stdout.write("python out\n")
        sys.stderr.write("python err\n")
        os.write(1, b"c out\n")
        os.write(2, b"c err\n")
        console.info("ours")
        console.result("result")
    os.write(1, b"after\n")
    streams = capfd.readouterr()
    assert streams.out == "result\nafter\n"
    assert streams.err == "ours\n"
    log = (tmp_path / "work" / "export.log").read_text()
    assert set(log.splitlines()) == {"python out", "python err", "c out", "c err"}


def test_verbose_captures_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Console(sys.stdout, sys.stderr, verbose=True).captured(tmp_path / "export.log"):
        os.write(2, b"c err\n")
    assert capfd.readouterr().err == "c err\n"


def test_guarded_keeps_stdout_for_the_result(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console = Console(sys.stdout, sys.stderr)
    with console.guarded():
        os.write(1, b"c out\n")
        console.result("result")
        with console.captured(tmp_path / "log"):
            os.write(1, b"to the log\n")
            console.result("more")
    streams = capfd.readouterr()
    assert streams.out == "result\nmore\n"
    assert streams.err == "c out\n"


def test_tables_align_words_left_and_numbers_right() -> None:
    text = table(("name", "bytes"), [("a", "5"), ("long name", "1,234")])
    assert text == "name       bytes\na              5\nlong name  1,234"
    assert table((), []) == ""
