"""The program's contract: exit codes, streams, one-line errors, JSON errors."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from losa_deploy.cli import formats
from losa_deploy.cli.command import Command
from losa_deploy.cli.main import main
from losa_deploy.cli.parser import commands
from losa_deploy.console import Console


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compres"], "Did you mean `losa-deploy compress`?"),
        (["compress", "--sparsty", "0.5"], "Did you mean --sparsity"),
        (["compress", "--loss", "mse"], "invalid choice: 'mse'"),
        (["compress", "--threads", "0"], "--threads"),
        (["compress", "--memory", "lots"], "expected one like 8G"),
        (["compress", "--device", "gpu"], "Use auto, cpu, cuda, cuda:0"),
        (["compress", "--device", "cuda:99", "--dry-run"], "Use --device cpu, or install"),
        (["compress-and-export", "--format", "onnx", "--device", "gpu"], "There is no device 'gpu'"),
        (["compress-and-export"], "--format"),
        (["compress-and-export", "--format", "onx"], "Did you mean `--format onnx`?"),
        (["inspect", "a", "b"], "one argument too many"),
        (["compress", "--preset", "fast"], "quick"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert words in streams.err
    assert streams.err.count("\n") == 1


def test_bad_input_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--json"]) == 3
    streams = capsys.readouterr()
    assert streams.out == ""
    error = json.loads(streams.err)
    assert error["schema"] == "losa.error/1"
    assert error["code"] == "input"
    assert "losa.json" in error["message"]
    assert error["hint"]


def test_mistyped_model_path_names_its_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "llama-base").mkdir()
    argv = ["compress", "--model", str(tmp_path / "lama-base"), "--output", str(tmp_path / "out")]
    assert main(argv) == 3
    assert "llama-base" in capsys.readouterr().err


def test_what_a_compression_takes_is_known_beforehand(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", "--model", str(tiny_llama), "--output", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "losa.compress-plan/1"
    assert 0 < found["seconds"] < 600 and 0 < found["disk_bytes"] < 10**8
    assert 3 * 10**8 < found["peak_ram_bytes"] == max(found["stages"].values()) < 10**9
    assert main([*argv, "--memory", "100M"]) == 4
    error = json.loads(capsys.readouterr().err)
    assert error["code"] == "resource" and error["details"]["available_bytes"] == 10**8
    assert main([*argv[:-2], "--memory", "100M"]) == 4, "a run that cannot fit does not start"
    assert "This needs about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_is_refused_before_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    argv = ["compress-and-export", "--format", "onnx", "--model", str(tmp_path), "--dry-run"]
    assert main(argv) == 3
    assert "llama" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Lets `losa-deploy formats` raise what the test appends."""
    errors: list[BaseException] = []

    def run(args: object, console: Console) -> None:
        sys.stdout.write("noise of a library\n")
        console.result("the result")
        for error in errors:
            raise error

    command = Command("formats", "x", ("a", "b"), formats.COMMAND.add_arguments, run, resumable=True)
    monkeypatch.setitem(commands(), "formats", command)
    return errors


def test_stdout_carries_the_result_only(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["formats"]) == 0
    streams = capsys.readouterr()
    assert streams.out == "the result\n"
    assert "noise of a library" in streams.err


def test_interruption_is_130_with_the_command_to_resume(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(KeyboardInterrupt())
    assert main(["formats", "--quiet"]) == 130
    assert "losa-deploy formats --quiet" in capsys.readouterr().err


def test_a_full_disk_is_exit_code_4_wherever_it_happens(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing.append(OSError(errno.ENOSPC, "No space left on device", "model.onnx.data"))
    assert main(["formats"]) == 4
    assert "model.onnx.data" in capsys.readouterr().err
    failing[0] = MemoryError()
    assert main(["formats"]) == 4


def test_a_bug_is_exit_code_1_with_a_log(
    failing: list[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    failing.append(ZeroDivisionError("what was that"))
    assert main(["formats"]) == 1
    error = capsys.readouterr().err
    logs = list(tmp_path.rglob("*.log"))
    assert len(logs) == 1
    assert str(logs[0]) in error
    assert "Traceback" not in error
    assert "what was that" in logs[0].read_text()


def test_a_closed_pipe_is_no_error() -> None:
    reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
    reader.wait()
    code = "import sys; from losa_deploy.cli.main import main; sys.exit(main(['formats', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_json_result_is_one_document_with_noise_around(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["schema"] == "losa.doctor/1"
    assert facts["memory_bytes"] > 0
    assert main(["formats", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert "onnx" in [entry["name"] for entry in listed["exporters"]]
    assert {"ort", "reference"} <= {entry["name"] for entry in listed["runtimes"]}


def test_sigint_leaves_no_traceback(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from losa_deploy.cli import doctor\n"
        "from losa_deploy.cli.main import main\n"
        "doctor.collect = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "error: Interrupted.\n"
    assert done.stdout == ""
