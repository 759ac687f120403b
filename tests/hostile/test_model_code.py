"""Code that a model folder brings is never run, whatever the command and whatever is typed on stdin."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAP = "from pathlib import Path\nPath({mark!r}).write_text('ran')\n"
FLAGS = ["--samples", "2", "--sequence-length", "16", "--steps", "1", "--adapt", "none", "--threads", "1"]
FLAGS += ["--offline"]
SHORT = ["--text-tokens", "64", "--window", "32"]


def set_trap(folder: Path, mark: Path, *, unknown: bool = False) -> None:
    """Let every configuration file of a model name Python code in the folder, which would write `mark`.

    `unknown`: the tokenizer's class is one that only that code has.
    """
    for name in ("configuration_trap", "modeling_trap", "tokenization_trap"):
        (folder / f"{name}.py").write_text(TRAP.format(mark=str(mark)))
    auto = {
        "AutoConfig": "configuration_trap.TrapConfig",
        "AutoModel": "modeling_trap.TrapModel",
        "AutoModelForCausalLM": "modeling_trap.TrapModel",
    }
    tokenizer = {"AutoTokenizer": ["tokenization_trap.Trap", "tokenization_trap.TrapFast"]}
    for file, entries in (("config.json", auto | tokenizer), ("tokenizer_config.json", tokenizer)):
        path = folder / file
        document = {**json.loads(path.read_text()), "auto_map": entries}
        if unknown and file == "tokenizer_config.json":
            document["tokenizer_class"] = "Trap"
        path.write_text(json.dumps(document))


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, with somebody who says yes to everything."""
    return subprocess.run(
        [sys.executable, "-m", "losa_deploy", *map(str, words)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )


def serve_until_ready(*words: str | Path) -> tuple[bool, str]:
    """Whether a server came to its ready document, and what it said otherwise; it is ended then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "losa_deploy", *map(str, words), "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("y\n" * 50)
    process.stdin.flush()
    ready = any(line == "}\n" for line in process.stdout)
    process.kill()
    return ready, process.communicate()[1]


@pytest.fixture(scope="module")
def trapped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder with code, and the file that exists once the code has run."""
    place = tmp_path_factory.mktemp("trapped")
    folder = Path(shutil.copytree(tiny_llama, place / "model"))
    set_trap(folder, place / "mark")
    return folder, place / "mark"


def test_the_trap_works(trapped: tuple[Path, Path]) -> None:
    folder, mark = trapped
    program = "import sys\nfrom transformers import AutoTokenizer\n"
    program += "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, check=False)
    assert mark.exists()
    mark.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "gguf"])
def test_the_whole_path_runs_no_code(form: str, trapped: tuple[Path, Path], tmp_path: Path) -> None:
    folder, mark = trapped
    done = run("compress-and-export", "-f", form, "-m", folder, "-o", tmp_path / "out", *FLAGS, *SHORT)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
    # What is passed on does not name code either, or brings none.
    assert not list((tmp_path / "out").glob("*.py"))
    generated = run("generate", "-m", tmp_path / "out", "Once", "--max-tokens", "2", "--threads", "1")
    assert generated.returncode == 0, generated.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "-o", "OUT", *FLAGS],
        ["compress-and-export", "-f", "onnx", "-o", "OUT", *FLAGS, "--dry-run"],
        ["generate", "Once", "--max-tokens", "2", "--runtime", "reference", "--threads", "1"],
        ["chat", "--runtime", "reference", "--max-tokens", "2", "--threads", "1"],
        ["serve", "--runtime", "reference", "--port", "0", "--threads", "1"],
    ],
    ids=lambda words: words[0] + ("-dry" if "--dry-run" in words else ""),
)
@pytest.mark.parametrize("unknown", [False, True], ids=["known", "unknown"])
def test_no_command_with_a_model_runs_code(
    words: list[str], unknown: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    folder, mark = Path(shutil.copytree(tiny_llama, tmp_path / "model")), tmp_path / "mark"
    set_trap(folder, mark, unknown=unknown)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    if words[0] == "serve":
        ready, said = serve_until_ready(*words, "-m", folder)
        assert ready or unknown, said
        assert "Traceback" not in said
    else:
        done = run(*words, "-m", folder)
        assert done.returncode in (0, 3), done.stderr
        assert "Traceback" not in done.stderr
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["evaluate", *SHORT], ["bench"], ["inspect"], ["verify"], ["export", "-f", "onnx"]]
)
def test_no_command_with_a_path_runs_code(
    words: list[str], trapped: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, mark = trapped
    more = ["-o", str(tmp_path / "out")] if words[0] == "export" else []
    done = run(words[0], folder, *words[1:], *more)
    assert done.returncode in (0, 2, 3, 5), done.stderr
    assert not mark.exists()


def test_every_call_of_from_pretrained_says_that_it_trusts_nothing() -> None:
    calls = 0
    for folder in ("losa_deploy", "exporters", "runtimes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr not in ("from_pretrained", "from_config"):
                    continue
                calls += 1
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
    assert calls >= 5
