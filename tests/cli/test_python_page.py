"""The examples of docs/python.md run, one after the other, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
CHECKS = """
assert exported.folder == Path("out") and (Path("out") / "model.onnx").is_file()
assert abs(model.manifest.sparsity_achieved - 0.6) < 0.01
assert found.perplexity > 1 and distance.kl.value > 0
assert logits.shape == (session.vocab_size,)
assert Path("out/report.md").is_file() and report.parity.ok
"""


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model").symlink_to(tiny_llama)
    (tmp_path / "notes.txt").write_text("A text of a few words, again and again. " * 30, "utf-8")
    code = "\n".join([*examples(), CHECKS])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("onnx ")


def test_a_stage_can_be_called_whatever_was_imported_before() -> None:
    code = (
        "import losa_deploy as losa\n"
        "assert not {'torch', 'onnxruntime', 'losa_deploy.pipeline'} & set(__import__('sys').modules)\n"
        "import losa_deploy.compress.schedule, losa_deploy.merge, losa_deploy.verify.check\n"
        "for stage in (losa.compress, losa.merge, losa.verify):\n"
        "    try:\n"
        "        stage()\n"
        "    except TypeError as error:\n"
        "        assert 'required positional argument' in str(error), error\n"
        "assert all(callable(getattr(losa, name)) for name in losa.__all__)\n"
        "try:\n"
        "    losa.nothing\n"
        "except AttributeError as error:\n"
        "    assert \"no attribute 'nothing'\" in str(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
