"""The whole path through the program, on the tiny model: files, streams, reuse, refusal, gates."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from losa_deploy.cli.main import main
from losa_deploy.layouts import VALUE_TYPES

FILES = {
    "model.onnx",
    "model.onnx.data",
    "genai_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "losa.json",
    "report.json",
    "report.md",
    "README.md",
    "recipe.yaml",
    "export.log",
}
QUICK = ["--samples", "8", "--sequence-length", "32", "--steps", "2", "--adapt-steps", "5"]
QUICK += ["--text-tokens", "200", "--window", "100", "--threads", "1", "--offline"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def losa(*argv: str | Path) -> Result:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in argv])
    return Result(code, out.getvalue(), err.getvalue())


def whole_path(model: Path, output: Path, *extra: str) -> Result:
    return losa("compress-and-export", "-m", model, "-f", "onnx", "-o", output, *QUICK, *extra)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _offline() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Output folder and streams of one run of the whole path."""
    output = tmp_path_factory.mktemp("whole") / "demo"
    return output, whole_path(tiny_llama, output)


@pytest.fixture
def copy(finished: tuple[Path, Result], tmp_path: Path) -> Path:
    """A copy of that output and its work folder, to be damaged or replaced."""
    output = tmp_path / "demo"
    for source, target in ((finished[0], output), (work(finished[0]), work(output))):
        shutil.copytree(source, target, symlinks=True)
    return output


def work(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def test_the_result_is_a_short_table_and_the_folder(finished: tuple[Path, Result]) -> None:
    output, result = finished
    assert result.code == 0, result.err
    *table, folder = result.out.splitlines()
    assert folder == str(output)
    assert 10 <= len(table) <= 15
    assert table[0].split() == ["dense", "merged", "exported", "Q4_0"]
    assert table[-1].startswith("Q4_0 of the same model in llama.cpp: ")
    for word in ("size", "sparsity", "perplexity", "decode", "peak RSS", "merge proof", "parity", "verdict"):
        assert any(line.startswith(word) for line in table), word
    assert result.err.startswith(f"Output: {output}")
    assert f"losa-deploy chat -m {output}" in result.err


def test_all_files_are_there_and_nothing_half_written(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    assert names(output) >= FILES
    assert names(output.parent) == {"demo", "demo.work"}
    assert {"adapted", "merged"} <= names(work(output))
    assert "training.svg" in names(output) and "](training.svg)" in (output / "report.md").read_text()
    assert "training.svg" not in json.loads((output / "losa.json").read_text())["files"]
    report = json.loads((output / "report.json").read_text())
    assert report["schema"] == "losa.report/1"
    assert report["merge_proof"]["ok"] is True
    assert report["parity"]["ok"] is True
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.01)
    assert {"source", "compress", "merge", "export", "verify"} <= set(report["timings"])


def test_no_path_of_this_machine_is_published(finished: tuple[Path, Result], tiny_llama: Path) -> None:
    output, _ = finished
    for path in output.iterdir():
        if path.suffix in {".json", ".md", ".yaml", ".onnx"}:
            text = path.read_bytes()
            assert str(output.parent).encode() not in text, path.name
            assert str(tiny_llama).encode() not in text, path.name


def test_an_existing_output_is_refused_at_once(finished: tuple[Path, Result], tiny_llama: Path) -> None:
    output, _ = finished
    before = (output / "report.json").read_bytes()
    result = whole_path(tiny_llama, output)
    assert (result.code, result.out) == (2, "")
    assert "--overwrite" in result.err
    assert result.err.count("\n") == 1
    assert (output / "report.json").read_bytes() == before


def test_a_second_run_reuses_the_work_and_gives_the_same_bytes(copy: Path, tiny_llama: Path) -> None:
    before = {n: (copy / n).read_bytes() for n in ("model.onnx", "model.onnx.data", "losa.json")}
    result = whole_path(tiny_llama, copy, "--overwrite", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["schema"] == "losa.report/1"
    assert f"reusing {work(copy) / 'merged'}" in result.err
    assert before == {n: (copy / n).read_bytes() for n in before}


def test_what_was_compressed_elsewhere_needs_no_memory_for_it_here(
    copy: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    refused = whole_path(tiny_llama, tmp_path / "fresh", "--memory", "100M", "--json")
    assert refused.code == 4, refused.err
    assert "GB of memory (" in json.loads(refused.err.splitlines()[-1])["message"]
    assert not (tmp_path / "fresh").exists()
    shutil.rmtree(work(copy) / "merged")
    again = whole_path(tiny_llama, copy, "--memory", "100M", "--overwrite")
    assert again.code == 0, again.err
    assert "Compressed before" in again.err and "Expected: peak memory" not in again.err


def test_another_recipe_starts_again_and_a_failed_gate_keeps_the_artifact(
    copy: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in VALUE_TYPES.values():
        monkeypatch.setattr(kind, "rounding_kl", -1.0)
    before = (copy / "losa.json").read_bytes()
    result = whole_path(tiny_llama, copy, "--overwrite", "--sparsity", "0.6", "--json")
    assert (result.code, result.out) == (6, "")
    assert "compressing again" in result.err
    error = json.loads(result.err.splitlines()[-1])
    assert error["code"] == "gate"
    failed = copy.with_name("demo.failed")
    assert error["details"]["kept"] == str(failed)
    assert (failed / "model.onnx").is_file()
    assert (copy / "losa.json").read_bytes() == before
    assert names(copy.parent) == {"demo", "demo.work", "demo.failed"}


def test_dry_run_estimates_first_and_knows_afterwards(
    finished: tuple[Path, Result], tiny_llama: Path, tmp_path: Path
) -> None:
    fresh = whole_path(tiny_llama, tmp_path / "new", "--dry-run", "--json")
    assert fresh.code == 0, fresh.err
    estimate = json.loads(fresh.out)
    assert estimate["estimated"] is True
    assert not list(tmp_path.iterdir())
    output, _ = finished
    again = losa("export", work(output) / "merged", "-f", "onnx", "--dry-run", "--json")
    plan = json.loads(again.out)
    assert plan["estimated"] is False
    real = json.loads((output / "losa.json").read_text())
    assert {t["name"]: t["bytes"] for t in real["linears"]}.items() <= {
        t["name"]: t["bytes"] for t in plan["tensors"]
    }.items()
    # The plan rounds the last tensor up to a page, the file ends where its bytes end.
    assert 0 <= plan["files"]["model.onnx.data"] - (output / "model.onnx.data").stat().st_size < 4096
    expected = {t["name"]: t["bytes"] for t in estimate["tensors"]}
    known = {t["name"]: t["bytes"] for t in plan["tensors"]}
    assert expected.keys() == known.keys()
    # Rows of 64 columns are short: what pads the values of each pair of rows is not estimated.
    assert sum(expected.values()) == pytest.approx(sum(known.values()), rel=0.06)


@pytest.mark.slow
def test_export_of_a_merged_folder_with_other_choices(finished: tuple[Path, Result], tmp_path: Path) -> None:
    merged = work(finished[0]) / "merged"
    argv = [
        "export",
        merged,
        "-f",
        "onnx",
        "-o",
        tmp_path / "f32",
        "--value-type",
        "f32",
        "--layout",
        "dense",
    ]
    result = losa(*argv, "--threads", "1", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["recipe"]["export"]["value_type"] == "f32"
    manifest = json.loads((tmp_path / "f32" / "losa.json").read_text())
    assert manifest["recipe"]["export"]["layout"] == "dense"
    assert {t["layout"] for t in manifest["linears"]} == {"dense"}


def test_verify_passes_and_finds_a_flipped_bit(copy: Path) -> None:
    good = losa("verify", copy, "--json", "--threads", "1")
    assert good.code == 0, good.err
    assert json.loads(good.out)["ok"] is True
    data = copy / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    bad = losa("verify", copy, "--threads", "1")
    assert bad.code == 6
    assert "model.onnx.data" in bad.err


def test_inspect_lists_every_linear(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    for folder, kind in ((output, "exported"), (work(output) / "merged", "merged")):
        result = losa("inspect", folder, "--json")
        document = json.loads(result.out)
        assert document["kind"] == kind
        tensors = {t["name"]: t for t in document["tensors"]}
        assert len([n for n in tensors if n.startswith("model.layers.")]) == 21
        assert tensors["model.layers.0.mlp.down_proj"]["sparsity"] == pytest.approx(0.5, abs=0.05)
        assert "model.layers.2.self_attn.q_proj" in losa("inspect", folder).out


def test_generate_chat_evaluate_and_bench(
    finished: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = finished
    texts = []
    for folder in (output, work(output) / "merged"):
        result = losa("generate", "-m", folder, "Anna has", "--max-tokens", "8", "--threads", "1", "--json")
        assert result.code == 0, result.err
        texts.append(json.loads(result.out)["text"])
    assert texts[0] == texts[1] != ""
    streamed = losa("generate", "-m", output, "Anna has", "--max-tokens", "8", "--threads", "1")
    assert streamed.out == texts[0] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/exit\n"))
    chat = losa("chat", "-m", output, "--max-tokens", "4", "--threads", "1", "--quiet")
    assert chat.code == 0, chat.err
    assert chat.out.endswith("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnna?\n"))
    chat = losa("chat", "-m", output, "--max-tokens", "4", "--threads", "1", "--json")
    assert [m["role"] for m in json.loads(chat.out)["messages"]] == ["user", "assistant"] * 2
    argv = ["evaluate", output, "--window", "100", "--text-tokens", "200", "--threads", "1", "--json"]
    merged = str(work(output) / "merged")
    evaluated = json.loads(losa(*argv, "--dense", merged).out)
    assert evaluated["perplexity"] == pytest.approx(evaluated["dense_perplexity"], rel=0.05)
    assert 0 < evaluated["kl_to_dense"] < 0.02 and evaluated["dense_runtime"] == "reference"
    argv = ["bench", output, "--prompt-tokens", "16", "--decode-tokens", "4", "--repetitions", "2", "--json"]
    result = losa(*argv, "--threads", "1")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["schema"] == "losa.bench/1"
    assert document["machine"]["cores"] >= 1
    models = document["results"]
    assert len(models) == 2
    assert models[0]["name"].startswith("dense ")
    assert all(m["peak_rss_bytes"] > 0 and len(m["samples"]) == 2 for m in models)
    assert models[0]["bytes"] > models[1]["bytes"] > 0


def test_gguf_is_planned_and_other_formats_flags_are_refused(
    finished: tuple[Path, Result], tiny_llama: Path, tmp_path: Path
) -> None:
    argv = [
        "compress-and-export",
        "-m",
        tiny_llama,
        "-f",
        "gguf",
        "-o",
        tmp_path / "new",
        *QUICK,
        "--dry-run",
    ]
    alone = json.loads(losa(*argv, "--json").out)
    assert list(alone["files"]) == ["portable .gguf"]
    both = json.loads(losa(*argv, "--json", "--packed", "--portable").out)
    assert list(both["files"]) == ["packed .gguf", "portable .gguf"]
    assert both["files"]["packed .gguf"] < both["files"]["portable .gguf"] == alone["total_bytes"]
    merged = work(finished[0]) / "merged"
    known = json.loads(losa("export", merged, "-f", "gguf", "--packed", "--dry-run", "--json").out)
    (name,) = known["files"]
    assert name.endswith("-LOSA-I4.gguf")
    assert known["total_bytes"] > both["files"]["packed .gguf"]  # it knows of the tokenizer
    refused = losa(*argv, "--bundle-runtime")
    assert refused.code == 2 and "--format onnx" in refused.err
    refused = losa("export", merged, "-f", "onnx", "--packed", "--dry-run")
    assert refused.code == 2 and "--format gguf" in refused.err


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_any_work(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    model, output = tmp_path / "opt", tmp_path / "out"
    shutil.copytree(tiny_tokenizer, model)
    sizes = {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1}
    OPTForCausalLM(
        OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=64)
    ).save_pretrained(str(model))
    for extra in ([], ["--dry-run"]):
        result = losa("compress-and-export", "-m", model, "-f", "gguf", "-o", output, *QUICK, *extra)
        assert result.code == 3, result.err
        assert "no graph for opt" in result.err and "--format onnx" in result.err
        assert not output.exists() and not (work(output) / "adapted").exists()


@pytest.mark.slow
def test_stage_by_stage_and_without_the_work_folder(tiny_llama: Path, tmp_path: Path) -> None:
    options = [*QUICK[:8], "--threads", "1"]
    done = losa("compress", "-m", tiny_llama, "-o", tmp_path / "adapted", *options)
    assert (done.code, done.out) == (0, f"{tmp_path / 'adapted'}\n"), done.err
    again = losa("compress", "-m", tiny_llama, "-o", tmp_path / "adapted", *options)
    assert "reusing" in again.err
    other = losa("compress", "-m", tiny_llama, "-o", tmp_path / "adapted", *options, "--seed", "1")
    assert other.code == 2
    assert "--overwrite" in other.err
    argv = ["merge", tmp_path / "adapted", "-m", tiny_llama, "-o", tmp_path / "merged", "--json"]
    merged = losa(*argv)
    assert merged.code == 0, merged.err
    assert json.loads(merged.out)["merge_proof"]["support_equal"] is True
    assert losa("verify", tmp_path / "merged").code == 0
    assert losa(*argv).code == 2
    whole = whole_path(tiny_llama, tmp_path / "whole", "--no-keep-work", "--verify", "off")
    assert whole.code == 0, whole.err
    assert "--verify off" in whole.err
    assert not work(tmp_path / "whole").exists()


@pytest.mark.slow
def test_ctrl_c_keeps_finished_steps_and_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    def command(output: Path) -> list[str]:
        argv = ["compress", "-m", str(tiny_llama), "-o", str(output), *QUICK[:4], "--threads", "1"]
        return [sys.executable, "-m", "losa_deploy", *argv, "--steps", "4", "--adapt-steps", "5"]

    running = subprocess.Popen(
        command(tmp_path / "stopped"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stderr is not None
    seen = ""
    while "step 2/4" not in seen:
        line = running.stderr.readline()
        assert line, seen
        seen += line
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=180)
    assert running.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert f"losa-deploy compress -m {tiny_llama}" in err.splitlines()[-1]
    done = json.loads((tmp_path / "stopped" / "state.json").read_text())["step"]
    assert 1 <= done < 4  # how far it came before the signal is the machine's business
    resumed = subprocess.run(command(tmp_path / "stopped"), capture_output=True, text=True, check=True)
    assert f"Resuming after step {done} of 4" in resumed.stderr
    subprocess.run(command(tmp_path / "straight"), capture_output=True, check=True)
    shards = sorted((tmp_path / "straight").rglob("*.safetensors"))
    assert len(shards) == 4
    for shard in shards:
        other = tmp_path / "stopped" / shard.relative_to(tmp_path / "straight")
        assert other.read_bytes() == shard.read_bytes()


def test_a_foreign_folder_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("out", "adapted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("ten years of work")
    assert whole_path(tiny_llama, tmp_path / "out", "--overwrite").code == 2
    for flags in ([], ["--overwrite"]):
        argv = ["compress", "-m", tiny_llama, "-o", tmp_path / "adapted", *QUICK[:8], *flags]
        assert losa(*argv).code == 2
    assert all((tmp_path / n / "thesis.txt").read_text() == "ten years of work" for n in ("out", "adapted"))
