"""Request bodies: what is understood, what is accepted only as its neutral default, and nothing else."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant")


def refuse(words: str, **values: object) -> PydanticCustomError:
    """An error that `validation_error` reports as an unsupported field."""
    return PydanticCustomError("unsupported", words, values)


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON: `true` is no 1 and `false` no 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


class _Neutral:
    """Accepts a field that is not implemented as long as its value asks for nothing."""

    def __init__(self, *values: object) -> None:
        self._values = (None, *values)

    def __call__(self, value: object) -> object:
        if not any(_same(value, neutral) for neutral in self._values):
            allowed = ", ".join("null" if v is None else repr(v) for v in self._values)
            raise refuse("this server does not support it; only {allowed}", allowed=allowed)
        return value


Nothing = Annotated[object, AfterValidator(_Neutral())]
NoneOrEmpty = Annotated[object, AfterValidator(_Neutral([], {}))]
Zero = Annotated[object, AfterValidator(_Neutral(0))]
One = Annotated[object, AfterValidator(_Neutral(1))]
No = Annotated[object, AfterValidator(_Neutral(False))]
NoTools = Annotated[object, AfterValidator(_Neutral("none", "auto"))]
TextOnly = Annotated[object, AfterValidator(_Neutral(["text"]))]
Tier = Annotated[object, AfterValidator(_Neutral("auto", "default"))]
Verbosity = Annotated[object, AfterValidator(_Neutral("medium"))]
Effort = Annotated[object, AfterValidator(_Neutral("none"))]
PlainFormat = Annotated[object, AfterValidator(_Neutral({"type": "text"}))]
Label = Annotated[object, Field(default=None)]
"""Says something about the request and asks for nothing: accepted and not used."""


def _stops(value: object) -> object:
    """One string or a list of them → list."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list) else None
    if value is None:
        return []
    if items is None or not all(isinstance(i, str) and i for i in items):
        raise PydanticCustomError("stop", "expected a non-empty string or a list of them")
    if len(items) > MAX_STOPS:
        raise PydanticCustomError("stop", "at most {most} strings", {"most": MAX_STOPS})
    return items


def _prompts(value: object) -> object:
    """Any of OpenAI's four forms of a prompt → list of strings or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(i, str) for i in value):
            return value
        if all(_is_token(i) for i in value):
            return [value]
        if all(isinstance(i, list) and i and all(_is_token(t) for t in i) for i in value):
            return value
    raise PydanticCustomError("prompt", "expected a string, token ids, or a list of such prompts")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _content(value: object) -> object:
    """A string, or text parts put together."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "expected a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise refuse("a part is of type {kind}; only text is supported", kind=repr(kind))
        text = part.get("text")
        if not isinstance(text, str):
            raise PydanticCustomError("content", "a text part has no text")
        texts.append(text)
    return "".join(texts)


def _role(value: object) -> object:
    if value not in ROLES:
        raise refuse(
            "the role {role} is not supported; only {roles}", role=repr(value), roles=", ".join(ROLES)
        )
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Message(_Strict):
    """One turn. What a reply of this server carries beside its text is accepted back."""

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)]
    name: Nothing = None
    refusal: Nothing = None
    tool_calls: NoneOrEmpty = None
    tool_call_id: Nothing = None
    function_call: Nothing = None
    audio: Nothing = None
    annotations: NoneOrEmpty = None


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = False
    include_obfuscation: No = None


class _Common(_Strict):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Not OpenAI's: sample among so many tokens; 0 for all."""
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: NoneOrEmpty = None
    user: Label

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, data: object) -> object:
        """JSON can name half of a surrogate pair, which is no text that a tokenizer takes."""
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise PydanticCustomError(
                "text", "{half} is half of a surrogate pair", {"half": ascii(error.object[error.start])}
            ) from None
        return data

    @field_validator("stream_options")
    @classmethod
    def _usage_needs_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise refuse("it needs stream: true")
        return value


class ChatRequest(_Common):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: PlainFormat = None
    tools: NoneOrEmpty = None
    tool_choice: NoTools = None
    functions: NoneOrEmpty = None
    function_call: NoTools = None
    parallel_tool_calls: Label
    modalities: TextOnly = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Effort = None
    verbosity: Verbosity = None
    web_search_options: Nothing = None
    moderation: Nothing = None
    service_tier: Tier = None
    store: No = None
    metadata: Label
    safety_identifier: Label
    prompt_cache_key: Label
    prompt_cache_retention: Label

    @property
    def limit(self) -> int | None:
        """The most tokens of the reply, if the request says."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Common):
    """Body of /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: One = None
    echo: No = None
    suffix: Annotated[object, AfterValidator(_Neutral(""))] = None
