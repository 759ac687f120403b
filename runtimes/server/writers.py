"""From replies to response bodies: one writer per endpoint, each for whole answers and for events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import BaseModel

from .answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    ReplyMessage,
    TextChoice,
    WholeCompletion,
    chat_logprobs,
    text_logprobs,
    usage,
)
from .text import Piece, Reply, TokenText


@dataclass(frozen=True)
class Whole:
    """A reply with all of its pieces."""

    reply: Reply
    text: str
    tokens: tuple[TokenText, ...]


async def collect(reply: Reply) -> Whole:
    """All pieces of one reply; raises `EngineFailure`."""
    pieces = [piece async for piece in reply.pieces()]
    return Whole(reply, "".join(p.text for p in pieces), tuple(t for p in pieces for t in p.tokens))


class Writer(Protocol):
    """How an endpoint says what was generated. `index` counts the prompts of a request."""

    def whole(self, answers: Sequence[Whole], prompt_tokens: int) -> BaseModel:
        """The body of an answer that is not streamed."""
        ...

    def opening(self, index: int) -> BaseModel | None:
        """The event before the first text, if there is one."""
        ...

    def piece(self, index: int, piece: Piece) -> BaseModel:
        """The event of some text."""
        ...

    def closing(self, index: int, reply: Reply) -> BaseModel:
        """The event that says why it ended."""
        ...

    def counts(self) -> BaseModel:
        """The event without choices that carries `usage`."""
        ...


def _identifier(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


@dataclass
class ChatWriter:
    """Writes chat completions."""

    model: str
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: _identifier("chatcmpl"))

    def whole(self, answers: Sequence[Whole], prompt_tokens: int) -> BaseModel:
        """The body of an answer that is not streamed."""
        choices = [
            ChatChoice(
                message=ReplyMessage(content=answer.text),
                logprobs=chat_logprobs(answer.tokens) if self.logprobs else None,
                finish_reason=answer.reply.finish,
            )
            for answer in answers
        ]
        counts = usage(prompt_tokens, sum(a.reply.tokens for a in answers))
        return ChatCompletion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=counts
        )

    def opening(self, index: int) -> BaseModel | None:
        """The role."""
        return self._chunk(ChunkChoice(index=index, delta={"role": "assistant", "content": ""}))

    def piece(self, index: int, piece: Piece) -> BaseModel:
        """Some content."""
        logprobs = chat_logprobs(piece.tokens) if self.logprobs else None
        return self._chunk(ChunkChoice(index=index, delta={"content": piece.text}, logprobs=logprobs))

    def closing(self, index: int, reply: Reply) -> BaseModel:
        """Why it ended."""
        return self._chunk(ChunkChoice(index=index, delta={}, finish_reason=reply.finish))

    def counts(self) -> BaseModel:
        """A chunk without choices."""
        return self._chunk()

    def _chunk(self, *choices: ChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=list(choices))


@dataclass
class TextWriter:
    """Writes text completions."""

    model: str
    logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: _identifier("cmpl"))

    def whole(self, answers: Sequence[Whole], prompt_tokens: int) -> BaseModel:
        """The body of an answer that is not streamed."""
        choices = [
            TextChoice(
                text=answer.text,
                index=index,
                logprobs=text_logprobs(answer.tokens) if self.logprobs else None,
                finish_reason=answer.reply.finish,
            )
            for index, answer in enumerate(answers)
        ]
        counts = usage(prompt_tokens, sum(a.reply.tokens for a in answers))
        return WholeCompletion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=counts
        )

    def opening(self, index: int) -> BaseModel | None:
        """Text completions begin with text."""
        return None

    def piece(self, index: int, piece: Piece) -> BaseModel:
        """Some text."""
        logprobs = text_logprobs(piece.tokens) if self.logprobs else None
        return self._event(TextChoice(text=piece.text, index=index, logprobs=logprobs))

    def closing(self, index: int, reply: Reply) -> BaseModel:
        """Why it ended."""
        return self._event(TextChoice(text="", index=index, finish_reason=reply.finish))

    def counts(self) -> BaseModel:
        """An event without choices."""
        return self._event()

    def _event(self, *choices: TextChoice) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=list(choices))
