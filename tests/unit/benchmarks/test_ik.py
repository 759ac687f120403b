"""ik_llama.cpp as a peer. Where it is not installed, LOSA_TEST_IK may name the folder it was put into."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.benchmarks.ik.package import PEERS, IkPackage, find_package, last_words
from losa_deploy.benchmarks.ik.runtime import IkRuntime
from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.benchmarks.synthetic.peers import default_peers, known_peers
from losa_deploy.cli.main import main
from losa_deploy.errors import LosaError, MissingError
from losa_deploy.runtimes.llamacpp.runtime import StockLlamaCppRuntime

TINY = GEOMETRIES["tiny"]
NAMES = {"ik-q4_0", "ik-q3_k_s", "ik-iq3_k", "ik-q2_k", "ik-iq4_ks", "ik-iq2_k"}
BENCH = ["bench", "--geometry", "tiny", "--runtime", "llamacpp", "--pattern", "2:4", "--threads", "1"]


@pytest.fixture(scope="module")
def package() -> IkPackage:
    folder = os.environ.get("LOSA_TEST_IK")
    try:
        return find_package(Path(folder) if folder else None)
    except MissingError as error:
        pytest.skip(str(error))


def test_peers_are_measured_in_llama_cpp_if_they_are_named() -> None:
    assert set(PEERS) == NAMES and set(known_peers("llamacpp")) > NAMES
    assert not NAMES & {*default_peers("llamacpp"), *known_peers("ort")}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (
            [*BENCH, "--peers", "q4_0,ik-q3_k_s", "--ik-path", "FOLDER"],
            5,
            "pip install --no-deps --target DIR",
        ),
        ([*BENCH[:3], "--peers", "ik-q3_k_s"], 2, "There is no peer 'ik-q3_k_s'"),
        ([*BENCH, "--peers", "ik-q3_ks"], 2, "Did you mean `--peers ik-q3_k_s`"),
        (["bench", "kernels", "--ik-path", "FOLDER"], 2, "--ik-path says nothing about `bench kernels`"),
    ],
)
def test_refusals_come_before_any_model_is_made(
    argv: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ik").mkdir()
    argv = [str(tmp_path / "ik") if word == "FOLDER" else word for word in argv]
    keep = ["--keep", str(tmp_path / "kept")] if "--geometry" in argv else []
    assert main([*argv, *keep]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("kept/*"))


def test_of_what_a_process_said_the_failed_assertion_is_the_reason() -> None:
    said = "converting .. /x/ggml-quants.c:9: GGML_ASSERT(n % 32 == 0) failed\n#1 0x0 in ?? ()\n30 wait4.c\n"
    assert last_words(said) == "GGML_ASSERT(n % 32 == 0) failed"
    assert last_words("one\ntwo\n\n") == "two" and last_words("") == "it said nothing"


def test_a_package_without_its_functions_is_told_by_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "ik_llama_cpp"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    runtime = IkRuntime(IkPackage(tmp_path, "9"))
    with pytest.raises(LosaError, match=r"exit code 5 .*ik_llama_cpp\._ctypes_api"):
        runtime.open(tmp_path / "model.gguf", threads=1)
    with pytest.raises(LosaError, match=r"exit code 5: .*ik_llama_cpp\._ctypes_api"):
        runtime.footprint(tmp_path / "model.gguf", 1)


def test_a_session_computes_what_llama_cpp_computes(package: IkPackage, tmp_path: Path) -> None:
    tokens = [int(token) for token in np.random.default_rng(0).integers(3, TINY.vocab, 767)]
    ggufs.build_ik_peer(TINY, "ik-q4_0", tmp_path / "ik", 0, 1, package)
    ggufs.build_peer(TINY, "q4_0", tmp_path / "q4_0", 0, 1)
    stock = StockLlamaCppRuntime().open(tmp_path / "q4_0", threads=1)
    session = IkRuntime(package).open(tmp_path / "ik", threads=1)
    try:
        found, expected = session.logits(tokens), stock.logits(tokens)
        assert found.shape == (len(tokens), TINY.vocab) == (len(tokens), session.vocab_size)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97
        assert np.abs(session.prefill(tokens[:500]) - found[499]).max() < 0.2
        for position in range(500, 767):  # over the end of a batch
            row = session.step(tokens[position])
        assert np.abs(row - found[-1]).max() < 0.2
        session.prefill(tokens[:100])
        for position in range(100, 520):  # over the end of the context
            row = session.step(tokens[position])
        assert np.abs(row - found[519]).max() < 0.2
    finally:
        session.close()
        stock.close()


def test_a_model_that_cannot_be_opened_is_an_error_with_its_reason(
    package: IkPackage, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(LosaError, match=r"ik_llama\.cpp cannot open"):
        IkRuntime(package).open(tmp_path / "model.gguf", threads=1)
    with pytest.raises(LosaError, match="could not quantize"):
        ggufs.ik_package.quantize(package, tmp_path / "none.gguf", tmp_path / "out", "ik-q2_k", 1)


def test_peers_of_ik_are_results_like_others(
    package: IkPackage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["q4_0", *sorted(NAMES), "ours-dense-i4", "ours-dense-i3"]
    argv = [*BENCH, "--value-type", "i3", "--peers", ",".join(names), "--ik-path", str(package.folder)]
    argv += ["--prompt-tokens", "8", "--decode-tokens", "4", "--prefill-tokens", "16", "--repetitions", "1"]
    code = main([*argv, "--keep", str(tmp_path), "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    document = json.loads(streams.out)
    assert document["schema"] == "losa.bench/1"
    assert [result["name"] for result in document["results"]] == ["ours", *names]
    for result in document["results"]:
        assert result["decode_tokens_per_second"] > 0 and result["prefill_tokens_per_second"] > 0
        assert result["bytes"] > 0 and result["peak_rss_bytes"] > 10e6
