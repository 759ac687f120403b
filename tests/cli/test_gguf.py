"""GGUF artifacts, as folders and as bare files, through the commands."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from losa_deploy.gguf.file import open_gguf
from losa_deploy.manifest import Manifest, hash_files

from .test_pipeline import QUICK, Result, losa, work

THREADS = ("--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def _offline() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A portable and a packed file of one run of the whole path, and its streams."""
    output = tmp_path_factory.mktemp("gguf") / "demo"
    argv = ["compress-and-export", "-m", tiny_llama, "-f", "gguf", "--packed", "--portable", "-o", output]
    return output, losa(*argv, *QUICK)


@pytest.fixture(scope="module")
def packed(finished: tuple[Path, Result]) -> Path:
    return next(finished[0].glob("*-LOSA-I4.gguf"))


@pytest.fixture(scope="module")
def portable(finished: tuple[Path, Result]) -> Path:
    return next(finished[0].glob("*-Q4_0.gguf"))


def alone(path: Path, folder: Path) -> Path:
    """A copy of one file in a folder of its own, without tokenizer files."""
    target = folder / path.name
    shutil.copyfile(path, target)
    return target


def test_the_whole_path(finished: tuple[Path, Result], packed: Path, portable: Path) -> None:
    output, result = finished
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == str(output)
    assert packed.stat().st_size < portable.stat().st_size
    assert "not smaller" in result.err  # what is said of the portable file
    report = json.loads((output / "report.json").read_text())
    assert report["parity"]["ok"] is True
    assert report["format"] == "gguf"
    assert (report["dense"]["runtime"], report["exported"]["runtime"]) == ("llamacpp-stock", "llamacpp")
    assert "dense f16" in (output / "report.md").read_text()
    assert (work(output) / "dense-gguf").is_dir()


def test_the_same_text_from_folder_files_and_merged_model(
    finished: tuple[Path, Result], packed: Path, portable: Path, tmp_path: Path
) -> None:
    output, _ = finished
    models = [work(output) / "merged", output, packed, portable, alone(portable, tmp_path)]
    models.append(alone(packed, tmp_path))
    texts = []
    for model in models:
        result = losa("generate", "-m", model, "Anna has", "--max-tokens", "8", *THREADS, "--json")
        assert result.code == 0, result.err
        document = json.loads(result.out)
        texts.append((document["text"], document["prompt_tokens"]))
    assert len(set(texts)) == 1 and texts[0][0] != ""


def test_chat_and_evaluate(
    finished: tuple[Path, Result], portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies, perplexities = [], []
    for model in (finished[0], alone(portable, tmp_path)):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnna?\n"))
        chat = losa("chat", "-m", model, "--max-tokens", "6", *THREADS, "--json")
        assert chat.code == 0, chat.err
        replies.append(json.loads(chat.out)["messages"])
        argv = ["evaluate", model, "--window", "100", "--text-tokens", "200", *THREADS, "--json"]
        perplexities.append(json.loads(losa(*argv).out)["perplexity"])
    # Not the same words: the files have groups of 128 and of 32, and two tokens may be equally likely.
    for messages in replies:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2
        assert [messages[0]["content"], messages[2]["content"]] == ["Hello", "Anna?"]
        assert messages[1]["content"] and messages[3]["content"]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.05)


def test_distance_from_a_dense_model_in_any_runtime(
    finished: tuple[Path, Result], packed: Path, portable: Path
) -> None:
    merged = work(finished[0]) / "merged"
    for model, dense, runtime in (
        (packed, merged, "reference"),
        (packed, portable, "llamacpp"),
        (merged, portable, "llamacpp"),
    ):
        argv = ["evaluate", "-m", model, "--dense", dense, "--window", "100", "--text-tokens", "200"]
        result = losa(*argv, *THREADS, "--json")
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert found["dense_runtime"] == runtime
        assert found["kl_to_dense"] < 0.02 and found["same_top_to_dense"] > 0.9
        if merged not in (model, dense):  # the same weights, in groups of 128 and of 32
            assert found["kl_to_dense"] < 1e-3


def test_inspect_shows_what_a_file_holds(packed: Path, portable: Path) -> None:
    found = {path: json.loads(losa("inspect", path, "--json").out) for path in (packed, portable)}
    for path, document in found.items():
        assert document["size_bytes"] == path.stat().st_size
        assert document["sparsity_achieved"] == pytest.approx(0.5, abs=0.01)
        assert document["architecture"] == "llama"
    assert found[packed]["packed"] and not found[portable]["packed"]
    assert found[packed]["bits_per_weight"] < found[portable]["bits_per_weight"] == 4.5
    tensor = next(t for t in found[packed]["tensors"] if t["name"] == "blk.0.ffn_down.weight")
    assert (tensor["layout"], tensor["shape"]) == ("bitmask", [64, 192])
    assert tensor["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert "blk.2.attn_q.weight" in losa("inspect", packed).out


def test_verify_passes_and_finds_a_flipped_bit(
    finished: tuple[Path, Result], tmp_path: Path, packed: Path, portable: Path
) -> None:
    output = tmp_path / "demo"
    shutil.copytree(finished[0], output)
    merged = work(finished[0]) / "merged"
    good = losa("verify", output, "--against", merged, "--json", *THREADS)
    assert good.code == 0, good.err
    assert json.loads(good.out)["ok"] is True
    for name in (packed.name, portable.name):
        path = output / name
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        bad = losa("verify", output, "--against", merged, *THREADS)
        assert bad.code == 6
        assert name in bad.err
        shutil.copyfile(finished[0] / name, path)


def test_verify_decodes_the_portable_file_too(
    finished: tuple[Path, Result], tmp_path: Path, portable: Path
) -> None:
    """A weight that is wrong in a file whose hash is right."""
    output = tmp_path / "demo"
    shutil.copytree(finished[0], output)
    with open_gguf(portable) as file:
        tensor = next(t for t in file.tensors if t.name == "blk.1.ffn_down.weight")
    content = bytearray((output / portable.name).read_bytes())
    content[tensor.offset + 1] ^= 0x40  # the exponent of the first scale
    (output / portable.name).write_bytes(content)
    manifest = Manifest.read(output)
    manifest.model_copy(update={"files": hash_files(output)}).write(output)
    bad = losa("verify", output, "--against", work(finished[0]) / "merged", *THREADS)
    assert bad.code == 6
    assert "portable file: model.layers.1.mlp.down_proj: found" in bad.err


def test_bench_beside_the_dense_model_and_its_quantizations(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    output, _ = finished
    load = ["--decode-tokens", "4", "--repetitions", "2", *THREADS, "--json"]
    result = losa("bench", output, "--prompt-tokens", "16", *load)
    assert result.code == 0, result.err
    models = json.loads(result.out)["results"]
    assert [m["runtime"] for m in models] == ["llamacpp-stock", "llamacpp"]
    peers = ("q4_0", "f16", "iq3_xxs", "ours-dense-i4")
    files = [
        "--text-tokens",
        "100",
        "--output",
        tmp_path / "out",
        "--plot",
        tmp_path / "plots" / "models.svg",
    ]
    result = losa("bench", output, "--peers", ",".join(peers), "--prefill-tokens", "32", *load, *files)
    assert result.code == 0, result.err
    document = json.loads(result.out)
    models = document["results"]
    assert [m["name"] for m in models] == [str(output), *peers]
    assert all(m["perplexity"] > 1 and m["peak_rss_bytes"] > 0 for m in models)
    assert models[1]["bytes"] < models[2]["bytes"]
    assert [m["runtime"] for m in models] == ["llamacpp", *["llamacpp-stock"] * 3, "llamacpp"]
    assert all(90 < m["perplexity_tokens"] <= 100 for m in models) and document["not_measured"] == []
    verdict = document["verdict"]
    assert verdict["take"].keys() == {"quality", "speed", "size"}
    assert set(verdict["take"].values()) <= {str(output), *peers}
    assert [file["name"] for file in verdict["files"]] == [str(output)]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document
    page, picture = ((tmp_path / "out" / name).read_text() for name in ("table.md", "quality.svg"))
    assert all(f"| {name} |" in page for name in peers) and f"- {verdict['lines'][0]}" in page
    assert picture == (tmp_path / "plots" / "models.svg").read_text()
    assert all(f">{name}</text>" in picture for name in (output.name, *peers))


@pytest.mark.slow
def test_bench_beside_onnx_runtimes_own_quantizations(
    finished: tuple[Path, Result], tiny_dense_onnx: Path, tmp_path: Path
) -> None:
    """And an ONNX folder of the user's own in the same call."""
    output, _ = finished
    names = "ort-int4,ort-int2,openvino-q4_0,f16"
    argv = ["bench", output, tiny_dense_onnx, "--peers", names, "--text-tokens", "400", *IK_LOAD]
    result = losa(*argv, "--openvino-path", tmp_path, "--keep", tmp_path / "kept", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    (missing,) = document["not_measured"]
    assert (
        missing["name"] == "openvino-q4_0" and "pip install --target DIR openvino-genai" in missing["reason"]
    )
    models = {m["name"]: m for m in document["results"]}
    assert list(models) == [str(output), str(tiny_dense_onnx), "ort-int4", "ort-int2", "f16"]
    assert [m["runtime"] for m in models.values()] == [
        "llamacpp",
        "ort",
        "ort-stock",
        "ort-stock",
        "llamacpp-stock",
    ]
    assert all(m["peak_rss_bytes"] > 10e6 and m["decode_tokens_per_second"] > 0 for m in models.values())
    four, two, half = (models[name] for name in ("ort-int4", "ort-int2", "f16"))
    assert two["bytes"] < four["bytes"] < models[str(tiny_dense_onnx)]["bytes"]
    assert four["perplexity"] == pytest.approx(half["perplexity"], rel=0.2)
    assert two["perplexity"] == pytest.approx(half["perplexity"], rel=0.6)  # of other text than it has learnt
    assert len({(m["perplexity_tokens"], m["perplexity_window"]) for m in models.values()}) == 1
    assert not list((tmp_path / "kept").glob("*.partial"))


IK_LOAD = ("--prefill-tokens", "32", "--decode-tokens", "4", "--repetitions", "2", *THREADS)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            'echo "x.c:9: GGML_ASSERT(n % 32 == 0) failed"; echo "#1 backtrace"; exit 134',
            "GGML_ASSERT(n % 32",
        ),
        ('cp "$1" "$2"', "cannot be loaded"),
    ],
    ids=["not quantized", "not opened"],
)
def test_a_peer_that_cannot_be_had_leaves_the_others(
    finished: tuple[Path, Result], tmp_path: Path, program: str, reason: str
) -> None:
    """A package of ik_llama.cpp whose quantizer fails, or whose library does."""
    quantizer = tmp_path / "ik_llama_cpp" / "bin" / "llama-quantize"
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text(f"#!/bin/sh\n{program}\n")
    quantizer.chmod(0o755)
    about = tmp_path / "ik_llama_cpp_python-9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ik-llama-cpp-python\nVersion: 9\n")
    (tmp_path / "ik_llama_cpp" / "__init__.py").write_text("")
    argv = ["bench", finished[0], "--peers", "ik-q4_0,q4_0", "--ik-path", tmp_path, *IK_LOAD]
    result = losa(*argv, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "warning: ik-q4_0 was not measured: ik_llama.cpp" in result.err and reason in result.err
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [m["name"] for m in document["results"]] == [str(finished[0]), "q4_0"]
    assert [m["name"] for m in document["not_measured"]] == ["ik-q4_0"]
    assert "Not measured:\n\n- ik-q4_0: " in (tmp_path / "out" / "table.md").read_text()
    lines = result.out.splitlines()
    # "For speed take …", "Instead of … take …", or "Take …" where one file is best in everything
    assert lines[0].split()[:2] == ["model", "runtime"] and "take " in result.out.lower()
    assert lines[-1] == document["verdict"]["lines"][-1]


def test_peers_of_ik_have_perplexities_on_the_same_windows(finished: tuple[Path, Result]) -> None:
    """Where ik_llama.cpp is not installed, LOSA_TEST_IK may name the folder it was put into."""
    place = os.environ.get("LOSA_TEST_IK")
    if place is None:
        pytest.skip("ik_llama.cpp is not there: LOSA_TEST_IK does not name its folder")
    argv = ["bench", finished[0], "--peers", "q4_0,ik-q4_0,ik-iq4_ks,f16", "--ik-path", place, *IK_LOAD]
    result = losa(*argv, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    models = {m["name"]: m for m in document["results"]}
    assert {"ik-q4_0", "q4_0"} <= set(models), document["not_measured"]
    assert models["ik-q4_0"]["runtime"] == "ik"
    assert models["ik-q4_0"]["perplexity"] == pytest.approx(models["q4_0"]["perplexity"], rel=0.05)
    assert len({(m["perplexity_tokens"], m["perplexity_window"]) for m in models.values()}) == 1


def test_bench_of_a_synthetic_model(tmp_path: Path) -> None:
    argv = ["bench", "--geometry", "tiny", "--runtime", "llamacpp", "--value-type", "i4", "--sparsity", "0.6"]
    argv += ["--peers", "q4_0,q8_0,f16", "--prefill-tokens", "32", "--decode-tokens", "4"]
    result = losa(*argv, "--repetitions", "2", *THREADS, "--keep", tmp_path, "--json")
    assert result.code == 0, result.err
    models = {m["name"]: m for m in json.loads(result.out)["results"]}
    assert list(models) == ["ours", "q4_0", "q8_0", "f16"]
    assert (
        models["ours"]["bytes"] < models["q4_0"]["bytes"] < models["q8_0"]["bytes"] < models["f16"]["bytes"]
    )
    assert all(len(m["samples"]) == 2 for m in models.values())


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"GGUF", "header"), (b"no model here", "GGUF")]
)
def test_damaged_files_end_with_a_message(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for argv in (["inspect", path], ["generate", "-m", path, "Anna", *THREADS]):
        result = losa(*argv)
        assert (result.code, result.out) == (3, "")
        assert "Traceback" not in result.err and str(path) in result.err
