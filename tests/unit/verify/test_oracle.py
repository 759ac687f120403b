"""The oracle: what torch says of a model, one block in memory, and how it continues what a runtime said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.lazy import Lazy
from losa_deploy.runtimes.reference import ReferenceRuntime
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.verify.distance import GreedyTrace
from losa_deploy.verify.oracle import Oracle, Question
from losa_deploy.verify.questions import Answers, Questions, ask, examine

LINEAR = "model.layers.1.mlp.down_proj"
SEQUENCES = ((5, 6, 7, 8, 9, 10), (11, 12), (13, 14, 15, 16, 17, 18), (19,))


def whole(oracle: Oracle) -> list[NDArray[np.float32]]:
    return list(oracle.answers([Question.whole(sequence) for sequence in SEQUENCES], threads=1))


def test_answers_are_those_of_transformers_in_their_order(tiny_llama: Path) -> None:
    session = ReferenceRuntime().open(tiny_llama, threads=1)
    for sequence, found in zip(SEQUENCES, whole(Oracle(Checkpoint.open(tiny_llama))), strict=True):
        expected = session.logits(sequence)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_only_the_last_positions_are_answered(tiny_llama: Path) -> None:
    oracle = Oracle(Checkpoint.open(tiny_llama))
    full = whole(oracle)
    (found,) = oracle.answers([Question(SEQUENCES[0], 2)], threads=1)
    assert found.shape == (2, 300)
    assert np.allclose(found, full[0][-2:], atol=1e-5)


def test_one_block_is_in_memory_and_each_is_read_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def load(self: Oracle, block: int) -> None:
        others = [index for index in range(len(self.blocks)) if index != block]
        assert all(p.is_meta for index in others for p in self.blocks[index].parameters())
        read.append(block)
        original(self, block)

    original = Oracle.load_block
    monkeypatch.setattr(Oracle, "load_block", load)
    whole(Oracle(Checkpoint.open(tiny_llama)))
    assert read == [0, 1, 2]


def test_weights_in_the_place_of_others_are_made_when_they_are_needed(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    made: list[str] = []

    def zero() -> NDArray[np.float32]:
        made.append("zero")
        return np.zeros(source.linears[LINEAR], np.float32)

    changed = Oracle(source, Lazy({LINEAR: zero}))
    assert made == []
    same = Oracle(source, {LINEAR: source.array(f"{LINEAR}.weight")})
    plain = whole(Oracle(source))
    assert np.abs(whole(changed)[0] - plain[0]).max() > 0.1
    assert made == ["zero"]
    assert all(np.array_equal(a, b) for a, b in zip(whole(same), plain, strict=True))


def test_a_replaced_head_leaves_the_tied_embedding(tiny_llama: Path) -> None:
    oracle = Oracle(Checkpoint.open(tiny_llama), {"lm_head": np.zeros((300, 64), np.float32)})
    assert not any(answer.any() for answer in whole(oracle))
    assert bool(oracle.model.get_parameter("model.embed_tokens.weight").any())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.9.mlp.up_proj", (192, 64), "no module"),
        ("model.layers.0.mlp.up_proj", (64, 192), "shape"),
        ("lm_head", (64, 300), "shape"),
    ],
)
def test_weights_that_do_not_fit(tiny_llama: Path, name: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole(Oracle(Checkpoint.open(tiny_llama), {name: np.zeros(shape, np.float32)}))


@pytest.fixture
def questions() -> Questions:
    return Questions(SEQUENCES, ((5, 6, 7), (20, 21)), ("a", "b"), steps=6, long=tuple(range(5, 45)))


def test_an_oracle_examines_a_runtime_as_it_would_have_been_asked_itself(
    tiny_llama: Path, questions: Questions
) -> None:
    """In one pass: sequences, the steps behind a long one, and prompts token by token."""
    said = ask(ReferenceRuntime().open(tiny_llama, threads=1), questions)
    found = examine(Oracle(Checkpoint.open(tiny_llama)), questions, said, threads=1)
    for one, other in zip(said.logits, found.logits, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < 1e-4
    for expected, trace in zip(said.traces, found.traces, strict=True):
        assert trace.tokens == expected.tokens
        assert np.abs(trace.logits - expected.logits).max() < 1e-4


def test_a_wrong_token_is_where_an_examination_parts_from_it(tiny_llama: Path, questions: Questions) -> None:
    """What the oracle would have said there is its own choice after the same tokens."""
    right = ask(ReferenceRuntime().open(tiny_llama, threads=1), questions)
    tokens = list(right.traces[0].tokens)
    tokens[3] = (tokens[3] + 1) % 300
    wrong = Answers(right.logits, (GreedyTrace(tuple(tokens), right.traces[0].logits), right.traces[1]))
    found = examine(Oracle(Checkpoint.open(tiny_llama)), questions, wrong, threads=1)
    assert found.traces[0].tokens[:4] == right.traces[0].tokens[:4]
    assert found.traces[0].tokens[3] != tokens[3]
    assert np.abs(found.traces[0].logits[:4] - right.traces[0].logits[:4]).max() < 1e-4
