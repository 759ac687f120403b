"""Sampling against exact distributions, end of generation, stop strings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.errors import InputError, UsageError
from losa_deploy.runtimes.generate import (
    GenerateOptions,
    StopScanner,
    generate,
    pick,
    probabilities,
    stream_text,
)
from losa_deploy.text.tokenizer import load_tokenizer

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))


class Counting:
    """A session whose next token is always the last one plus one."""

    vocab_size = 50

    def __init__(self, context_length: int = 0) -> None:
        self.context_length = context_length
        self.fed: list[int] = []

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.stack(
            [np.eye(self.vocab_size, dtype=np.float32)[(t + 1) % self.vocab_size] for t in tokens]
        )

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.fed = list(tokens)
        return self.logits(tokens)[-1]

    def step(self, token: int) -> NDArray[np.float32]:
        self.fed.append(token)
        return self.logits([token])[0]

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GenerateOptions(temperature=1.0), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (GenerateOptions(temperature=1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (GenerateOptions(temperature=1.0, top_k=9), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (GenerateOptions(temperature=1.0, top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (GenerateOptions(temperature=1.0, top_p=0.7), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (GenerateOptions(temperature=1.0, top_p=0.01), [0, 1, 0, 0, 0]),
        # top-p applies to what top-k left: 0.25 / 0.65 + 0.4 / 0.65 reach 0.6 with the first alone.
        (GenerateOptions(temperature=1.0, top_k=2, top_p=0.6), [0, 1, 0, 0, 0]),
        (
            GenerateOptions(temperature=0.5),
            np.square([0.1, 0.4, 0.05, 0.25, 0.2]) / np.square([0.1, 0.4, 0.05, 0.25, 0.2]).sum(),
        ),
    ],
)
def test_distribution(options: GenerateOptions, expected: Sequence[float]) -> None:
    np.testing.assert_allclose(probabilities(LOGITS, options), expected, atol=1e-6)


def test_ties_go_to_lower_ids() -> None:
    flat = np.zeros(6, np.float32)
    assert np.flatnonzero(probabilities(flat, GenerateOptions(temperature=1.0, top_k=2))).tolist() == [0, 1]
    assert np.flatnonzero(probabilities(flat, GenerateOptions(temperature=1.0, top_p=0.5))).tolist() == [
        0,
        1,
        2,
    ]
    assert pick(flat, GenerateOptions(), np.random.default_rng(0)) == 0


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([1e4, 0.0, -1e4, -np.inf], np.float32)
    assert probabilities(logits, GenerateOptions(temperature=0.01)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_samples_follow_the_distribution() -> None:
    options = GenerateOptions(temperature=1.0, top_k=3)
    random = np.random.default_rng(0)
    draws = 4000
    counts = np.bincount([pick(LOGITS, options, random) for _ in range(draws)], minlength=5)
    expected = probabilities(LOGITS, options)
    for count, p in zip(counts, expected, strict=True):
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_must_be_numbers(bad: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(InputError, match="instead of a logit"):
        pick(logits, GenerateOptions(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1),
                        ("top_p", 0.0), ("top_p", 1.1)]
)  # fmt: skip
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        GenerateOptions(**{name: value})  # type: ignore[arg-type]


def test_end_by_count_stop_id_and_context() -> None:
    session = Counting()
    assert list(generate(session, [3], GenerateOptions(max_tokens=4))) == [4, 5, 6, 7]
    assert session.fed == [3, 4, 5, 6]  # the last token is not fed: nobody asks what comes after it
    assert list(generate(session, [3], GenerateOptions(max_tokens=9, stop_ids=(7, 1)))) == [4, 5, 6]
    assert list(generate(session, [3], GenerateOptions(max_tokens=0))) == []
    assert list(generate(Counting(context_length=5), [1, 2, 3], GenerateOptions(max_tokens=9))) == [4, 5, 6]


def test_the_same_seed_gives_the_same_tokens(tiny_llama: Path) -> None:
    from losa_deploy.runtimes.reference import ReferenceRuntime

    session = ReferenceRuntime().open(tiny_llama, threads=1)
    runs = [
        list(generate(session, [40, 41], GenerateOptions(max_tokens=30, temperature=2.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        ([], ["a", "b"], "ab"),
        (["X"], ["aX", "b"], "a"),
        (["END"], ["one E", "N", "D two"], "one "),
        (["END"], ["one E", "N", "X two"], "one ENX two"),
        (["aab"], ["aa", "ab", "c"], "a"),
        (["END", "N"], ["oE", "ND"], "oE"),
        (["END", "N"], ["oEND"], "oE"),
        (["END"], ["one EN"], "one EN"),
        ([""], ["ab"], "ab"),
    ],
)
def test_stop_strings(stop: list[str], pieces: list[str], expected: str) -> None:
    scanner = StopScanner(stop)
    assert "".join(scanner.feed(piece) for piece in pieces) + scanner.flush() == expected


def test_text_is_passed_on_as_soon_as_it_is_certain() -> None:
    scanner = StopScanner(["stop"])
    assert [scanner.feed(c) for c in "a stab"] == ["a", " ", "", "", "sta", "b"]


def test_stream_text_ends_before_a_stop_string(tiny_llama: Path) -> None:
    from losa_deploy.runtimes.reference import ReferenceRuntime

    session = ReferenceRuntime().open(tiny_llama, threads=1)
    tokenizer = load_tokenizer(tiny_llama)
    prompt = tokenizer.encode("Anna has 2 red apples. Ben has")
    options = GenerateOptions(max_tokens=40)
    whole = "".join(stream_text(session, tokenizer, prompt, options))
    assert whole == tokenizer.decode(list(generate(session, prompt, options)))
    assert whole.startswith(" 3 green doors. Carla has")
    cut = "".join(stream_text(session, tokenizer, prompt, options, stop=["rs. C"]))
    assert cut == " 3 green doo"


@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-300])
def test_the_smallest_temperatures_take_the_best_token(temperature: float) -> None:
    logits = np.array([1.0, 3.0, -2.0, 2.9999], np.float32)
    found = probabilities(logits, GenerateOptions(max_tokens=1, temperature=temperature, top_p=0.5))
    assert found.tolist() == [0.0, 1.0, 0.0, 0.0]
