"""Perplexity as the literature computes it, and the distance from a dense model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.benchmarks.literature import TextWindows, compare_window, literature_windows, score_text
from losa_deploy.cli.main import main
from losa_deploy.errors import InputError
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer

HALF = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], np.float32))


class BigramSession:
    """A language model whose next-token logits depend on the last token only: row `token` of a table."""

    context_length = 0

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table
        self.vocab_size = table.shape[1]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.table[list(tokens)]

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        raise AssertionError("not needed")

    def step(self, token: int) -> NDArray[np.float32]:
        raise AssertionError("not needed")

    def close(self) -> None:
        pass


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, object], str]:
    """Exit code, JSON document and stderr of the command."""
    code = main(["evaluate", *map(str, argv), "--threads", "1", "--json"])
    streams = capsys.readouterr()
    return code, json.loads(streams.out) if streams.out else {}, streams.err


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny tokenizer as a Llama's: it puts its BOS before a text."""
    from tokenizers import Tokenizer as Inner
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("bos") / "tokenizer"
    shutil.copytree(tiny_tokenizer, folder)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_windows_are_whole_and_the_tail_is_dropped(tiny_tokenizer: Path, tiny_text: str) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    tokens = tokenizer.encode(tiny_text)
    found = literature_windows(tokenizer, tiny_text, 100, 10**9)
    assert [token for w in found.windows for token in w] == tokens[: len(tokens) // 100 * 100]
    assert {len(w) for w in found.windows} == {100} and len(tokens) % 100
    assert (found.text_tokens, found.bos) == (len(tokens), False)
    assert len(literature_windows(tokenizer, tiny_text, 100, 399).windows) == 3
    assert len(literature_windows(tokenizer, tiny_text, 100, 7).windows) == 1


def test_one_bos_at_the_very_start(bos_tokenizer: Tokenizer, tiny_text: str) -> None:
    found = literature_windows(bos_tokenizer, tiny_text, 100, 300)
    assert found.bos
    plain = bos_tokenizer.encode(tiny_text, special=False)
    assert [token for w in found.windows for token in w] == [bos_tokenizer.bos_id, *plain[:299]]


def test_a_short_text_is_one_short_window(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    found = literature_windows(tokenizer, "Anna has 2 red apples.", 100, 1000)
    assert found.windows == (tuple(tokenizer.encode("Anna has 2 red apples.")),)
    with pytest.raises(InputError, match="1 tokens, too few"):
        literature_windows(tokenizer, "A", 100, 1000)


def test_standard_errors_are_over_windows() -> None:
    windows = ((0, 0, 1), (2, 2, 2), (0, 1, 1))
    found, _ = score_text(BigramSession(HALF), TextWindows(windows, 9, False))
    means = np.array([1.5, 1.0, 1.5]) * math.log(2)
    assert found.perplexity == pytest.approx(math.exp(means.mean()))
    assert found.error == pytest.approx(math.exp(means.mean()) * means.std(ddof=1) / math.sqrt(3))
    alone, _ = score_text(BigramSession(HALF), TextWindows(windows[:1], 9, False))
    assert alone.stderr_windows is None and alone.error == alone.stderr > 0


def test_distance_of_two_tables_by_hand() -> None:
    other = HALF.copy()
    other[0] = np.log([0.25, 0.5, 0.25])
    text = TextWindows(((0, 1, 2, 0), (0, 0, 1, 2)), 8, False)
    found, distance = score_text(BigramSession(other), text, BigramSession(HALF))
    assert distance is not None
    single = 0.25 * math.log(2)  # scored are the positions 0 1 2 and 0 0 1
    assert distance.kl.value == pytest.approx(single * 3 / 6, rel=1e-5)
    per_window = np.array([1, 2]) / 3 * single
    assert distance.kl.stderr == pytest.approx(per_window.std(ddof=1) / math.sqrt(2), rel=1e-5)
    assert distance.same_top.value == pytest.approx(3 / 6)
    assert (distance.kl.count, distance.same_top.count) == (6, 6)
    pairs = ([0, 1, 2, 0, 0, 1], [1, 2, 0, 0, 1, 2])
    for table, quality in ((HALF, distance.dense), (other, found)):
        assert math.log(quality.perplexity) == pytest.approx(-float(table[pairs].mean()), rel=1e-6)


def test_distance_agrees_over_piece_borders() -> None:
    rng = np.random.default_rng(0)
    dense, model = (rng.normal(size=(150, 7)).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, 7, 151).tolist()
    loss, kl, same = compare_window(dense, model, tokens)
    p, q = (np.exp(a.astype(np.float64)) for a in (dense, model))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(150), tokens[1:]]))
    assert kl == pytest.approx((p * np.log(p / q)).sum(-1))
    assert (same == (p.argmax(-1) == q.argmax(-1))).all()


def test_models_that_cannot_be_compared_or_compute_nonsense_are_refused() -> None:
    text = TextWindows(((0, 1, 2),), 3, False)
    with pytest.raises(InputError, match=r"vocabulary of 3 tokens, the dense one of 4"):
        score_text(BigramSession(HALF), text, BigramSession(np.zeros((3, 4), np.float32)))
    with pytest.raises(InputError, match="model computes logits in window 1 that are no finite"):
        score_text(BigramSession(HALF * np.nan), text)
    with pytest.raises(InputError, match=r"model loses .* nats per token"):
        score_text(BigramSession(np.eye(3, dtype=np.float32) * 1e5), text)


def test_the_command_computes_what_the_usual_program_does(
    tiny_llama: Path, tiny_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "text.raw"
    file.write_text(tiny_text)
    code, found, err = evaluate(
        capsys, "-m", tiny_llama, "--text", file, "--window", 128, "--text-tokens", 700
    )
    assert code == 0, err
    ids = AutoTokenizer.from_pretrained(str(tiny_llama))(tiny_text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama), dtype=torch.float32)
    losses = []
    for start in range(0, 640, 128):
        window = ids[:, start : start + 128]
        with torch.no_grad():
            losses.append(float(model(window, labels=window).loss))
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    error = math.exp(sum(losses) / 5) * float(np.std(losses, ddof=1)) / math.sqrt(5)
    assert found["perplexity_stderr"] == pytest.approx(error, rel=1e-4)
    assert (found["window"], found["windows"], found["tokens"]) == (128, 5, 5 * 127)
    assert (found["schema"], found["bos"], found["stderr_over"]) == ("losa.evaluate/2", "none", "windows")
    assert found["joining"] == "as it is" and "kl_to_dense" not in found


def test_distance_from_dense_through_the_command(
    tiny_llama: Path, merged_half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--window", 100, "--text-tokens", 300)
    code, found, err = evaluate(capsys, "-m", merged_half, "--dense", tiny_llama, *flags)
    assert code == 0, err
    assert found["kl_to_dense"] > 0.001 < found["kl_to_dense_stderr"]  # type: ignore[operator]
    assert 0.3 < found["same_top_to_dense"] < 1.0  # type: ignore[operator]
    _, dense, _ = evaluate(capsys, tiny_llama, "--dense", tiny_llama, *flags)
    assert (dense["kl_to_dense"], dense["same_top_to_dense"]) == (0.0, 1.0)
    assert found["dense_perplexity"] == pytest.approx(dense["perplexity"])
    assert (found["dense"], found["dense_runtime"]) == (str(tiny_llama), "reference")


def test_rows_are_joined_by_a_blank_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["Anna has 2 red apples.", "", "Ben has 3 green doors."] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "joined.txt").write_text("\n\n".join(rows))
    numbers = []
    for name in ("rows.jsonl", "joined.txt"):
        code, found, err = evaluate(capsys, tiny_llama, "--text", tmp_path / name, "--window", 64)
        assert code == 0, err
        numbers.append((found["perplexity"], found["tokens_in_text"], found["windows"]))
    assert numbers[0] == numbers[1]


def test_a_window_longer_than_the_context_is_refused(
    tiny_llama: Path, merged_half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = evaluate(capsys, "-m", tiny_llama, "--window", 257)
    assert code == 2 and "257 tokens" in err and "only 256" in err and "--window 256" in err
    short = tmp_path / "short"
    shutil.copytree(tiny_llama, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    code, _, err = evaluate(capsys, "-m", merged_half, "--dense", short, "--window", 65)
    assert code == 2 and f"context of {short} only 64" in err
    code, found, err = evaluate(capsys, "-m", short, "--text-tokens", 128)
    assert code == 0 and found["window"] == 64 and "windows are that long, not 2048" in err


def test_a_short_text_is_said_to_be_short(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("Anna has 2 red apples. Ben has 3 green doors.")
    code, found, err = evaluate(capsys, tiny_llama, "--text", tmp_path / "short.txt", "--window", 256)
    assert code == 0 and "one short window" in err
    assert found["window"] == found["tokens_in_text"] == found["tokens"] + 1  # type: ignore[operator]
    assert (found["windows"], found["stderr_over"]) == (1, "tokens")


def test_flags_that_do_not_go_together_are_refused(
    tiny_llama: Path, bos_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    inner = json.loads((other / "tokenizer.json").read_text())
    inner["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(inner))
    cases: list[tuple[list[object], str]] = [
        ([], "No model was named"),
        ([tiny_llama, "-m", tiny_llama], "Two models"),
        (["-m", tiny_llama, "--window", 1], "window of 1 token"),
        (["-m", tiny_llama, "--limit", 1], "--limit needs tasks"),
        (["-m", tiny_llama, "--task-rows", tmp_path], "--task-rows needs tasks"),
        (["-m", tiny_llama, "--tasks", "piqa"], "--tasks needs the rows"),
        (["-m", tiny_llama, "--tasks", "piqa", "--task-rows", tmp_path, "--text-tokens", 9], "needs a text"),
        (["-m", tiny_llama, "--dense", other, "--window", 64], "splits text in another way"),
    ]
    for argv, message in cases:
        code, _, err = evaluate(capsys, *argv)
        assert code == 2 and message in err, (argv, err)
