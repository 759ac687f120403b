"""Which artifacts can be compared with quantizations of their dense model, and what these are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from losa_deploy.benchmarks.gguf_peers import real_peers
from losa_deploy.benchmarks.real_peers import all_real_peers, dense_file, peer_runtime
from losa_deploy.cli.main import main
from losa_deploy.errors import InputError


def test_artifacts_that_hold_no_file_for_it_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = tmp_path / "good", tmp_path / "other"
    for folder in (good, other):
        folder.mkdir()
    (good / "model.gguf").write_bytes(b"GGUF")
    assert peer_runtime([good]).supports(good)
    with pytest.raises(InputError, match="other holds no GGUF file and no ONNX model"):
        peer_runtime([good, other])
    assert main(["bench", str(other), "--peers", "q4_0"]) == 3
    assert "Leave --peers out, or export with --format gguf" in capsys.readouterr().err


def test_peers_are_made_of_the_dense_file_of_the_work_folder_or_of_the_baseline(tmp_path: Path) -> None:
    work = tmp_path / "demo.work"
    with pytest.raises(InputError, match=r"There is no dense GGUF in .*demo\.work/dense-gguf"):
        dense_file(work, None)
    kept = work / "dense-gguf" / "dense.gguf"
    kept.parent.mkdir(parents=True)
    kept.touch()
    given = tmp_path / "given.gguf"
    given.touch()
    assert dense_file(work, None) == kept
    assert dense_file(work, given) == dense_file(work, tmp_path) == given


def test_peers_of_other_runtimes_come_last() -> None:
    names = all_real_peers()
    assert names[: len(real_peers())] == real_peers() and len(set(names)) == len(names)
    others = {name.split("-")[0] for name in names[len(real_peers()) :]}
    assert others == {"ort", "openvino", "ik"}
