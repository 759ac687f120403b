"""Response bodies of the two completion endpoints, whole and in pieces, and of /v1/models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from .engine import FinishReason
from .text import TokenText


class Usage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat reply."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The one reply of a chat completion."""

    index: int = 0
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Body of a chat completion that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    """A piece of a streamed chat reply."""

    index: int = 0
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]


class TextLogprobs(BaseModel):
    """Log-probabilities in the older form; offsets count from the start of the reply."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One continuation, or a piece of it."""

    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Body of a text completion, or one event of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]


class WholeCompletion(Completion):
    """Body of a text completion that is not streamed."""

    usage: Usage


class ModelCard(BaseModel):
    """An entry of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "losa-deploy"


class ModelList(BaseModel):
    """Body of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def usage(prompt: int, completion: int) -> Usage:
    """The counts with their sum."""
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def chat_logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    """In the form of chat completions."""

    def one(token: TokenText) -> TopLogprob:
        return TopLogprob(token=token.text, logprob=token.logprob, bytes=token.bytes)

    return ChatLogprobs(
        content=[TokenLogprob(**one(t).model_dump(), top_logprobs=[one(a) for a in t.top]) for t in tokens]
    )


def text_logprobs(tokens: Sequence[TokenText]) -> TextLogprobs:
    """In the form of text completions; of alternatives with equal text the more likely one stays."""
    return TextLogprobs(
        tokens=[t.text for t in tokens],
        token_logprobs=[t.logprob for t in tokens],
        top_logprobs=[{a.text: a.logprob for a in reversed(t.top)} for t in tokens],
        text_offset=[t.offset for t in tokens],
    )
