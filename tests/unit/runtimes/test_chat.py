"""A conversation: history, trimming to the context, interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.runtimes.chat import ChatSession
from losa_deploy.runtimes.generate import GenerateOptions
from losa_deploy.text.tokenizer import Tokenizer, load_tokenizer

OPTIONS = GenerateOptions(max_tokens=8)


class Scripted:
    """A session that says the given text, then the end token, whatever it is asked."""

    def __init__(self, tokenizer: Tokenizer, text: str, context_length: int, interrupt_at: int = -1) -> None:
        self.vocab_size = tokenizer.size
        self.context_length = context_length
        self.prompts: list[list[int]] = []
        self._script = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
        self._interrupt_at = interrupt_at
        self._at = 0

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        raise AssertionError("a conversation needs no full logits")

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.prompts.append(list(tokens))
        self._at = 0
        return self._next()

    def step(self, token: int) -> NDArray[np.float32]:
        self._at += 1
        return self._next()

    def close(self) -> None: ...

    def _next(self) -> NDArray[np.float32]:
        if self._at == self._interrupt_at:
            raise KeyboardInterrupt
        return np.eye(self.vocab_size, dtype=np.float32)[self._script[self._at]]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def contents(chat: ChatSession) -> list[str]:
    return [message["content"] for message in chat.messages]


def test_history_is_in_the_next_prompt(tokenizer: Tokenizer) -> None:
    session = Scripted(tokenizer, "yes", 0)
    chat = ChatSession(session, tokenizer, OPTIONS, system="S")
    assert "".join(chat.reply("a")) == "yes"
    assert "".join(chat.reply("b")) == "yes"
    assert tokenizer.decode(session.prompts[1], special=True) == (
        "<|system|>S<|end|><|user|>a<|end|><|assistant|>yes<|end|><|user|>b<|end|><|assistant|>"
    )
    assert contents(chat) == ["S", "a", "yes", "b", "yes"]
    chat.reset()
    assert contents(chat) == ["S"]


def test_the_oldest_turns_are_dropped_and_said_so(tokenizer: Tokenizer) -> None:
    notices: list[str] = []
    session = Scripted(tokenizer, "ok", 48)
    chat = ChatSession(session, tokenizer, OPTIONS, system="S", notice=notices.append)
    for number in range(9):
        assert "".join(chat.reply(f"q{number}")) == "ok"
        assert len(session.prompts[-1]) + OPTIONS.max_tokens <= 48
    assert contents(chat)[0] == "S"
    assert contents(chat)[-2:] == ["q8", "ok"]
    assert "q0" not in contents(chat) and "q7" in contents(chat)
    assert len(notices) >= 3
    assert notices[0] == "The oldest turn was dropped to stay within 48 tokens of context."


def test_dropping_several_turns_at_once(tokenizer: Tokenizer) -> None:
    notices: list[str] = []
    chat = ChatSession(Scripted(tokenizer, "ok", 48), tokenizer, OPTIONS, notice=notices.append)
    for question in ("a", "b", "c"):
        list(chat.reply(question))
    assert not notices
    list(chat.reply("x" * 35))
    assert notices == ["The oldest 3 turns were dropped to stay within 48 tokens of context."]
    assert contents(chat) == ["x" * 35, "ok"]


def test_a_question_longer_than_the_context(tokenizer: Tokenizer) -> None:
    chat = ChatSession(Scripted(tokenizer, "ok", 48), tokenizer, OPTIONS)
    list(chat.reply("a"))
    question = "x" * 60
    tokens = len(tokenizer.chat([{"role": "user", "content": question}]))
    with pytest.raises(InputError, match=f"has {tokens} tokens, the model's context holds 48"):
        list(chat.reply(question))
    assert contents(chat) == ["a", "ok"]


def test_interrupting_keeps_what_was_said(tokenizer: Tokenizer) -> None:
    notices: list[str] = []
    session = Scripted(tokenizer, "abcdef", 0, interrupt_at=3)
    chat = ChatSession(session, tokenizer, OPTIONS, notice=notices.append)
    said = "".join(chat.reply("q"))
    assert 0 < len(said) < 6 and "abcdef".startswith(said)
    assert contents(chat) == ["q", said]
    assert notices == ["The reply was stopped."]


def test_interrupting_before_the_first_word_forgets_the_question(tokenizer: Tokenizer) -> None:
    chat = ChatSession(Scripted(tokenizer, "abc", 0, interrupt_at=0), tokenizer, OPTIONS)
    assert list(chat.reply("q")) == []
    assert contents(chat) == []


def test_a_reader_that_stops_listening(tokenizer: Tokenizer) -> None:
    chat = ChatSession(Scripted(tokenizer, "abc", 0), tokenizer, OPTIONS)
    reply = chat.reply("q")
    first = next(reply)
    reply.close()  # type: ignore[attr-defined]
    assert contents(chat) == ["q", first]


def test_no_template_is_said_at_the_start(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tokenizer.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("chat_template.jinja"))
    bare = load_tokenizer(tmp_path / "copy")
    with pytest.raises(InputError, match="no chat template"):
        ChatSession(Scripted(bare, "abc", 0), bare, OPTIONS)
