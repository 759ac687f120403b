"""From a checked request body to what the engine is asked: prompt ids, sampling, limits."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from losa_deploy.errors import InputError
from losa_deploy.text.tokenizer import Tokenizer

from ..generate import GenerateOptions
from .bounds import text_bound
from .engine import Engine, EngineRequest
from .errors import ApiError, validation_error
from .schema import ChatRequest, CompletionRequest

COMPLETION_TOKENS = 16
"""What /v1/completions generates if the request gives no limit, as OpenAI's does."""
UNLIMITED = 4096
"""Where the model does not say how long its context is."""
SEEDS = 2**64
Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class Model:
    """What the server serves."""

    name: str
    tokenizer: Tokenizer
    engine: Engine
    created: int

    def check_name(self, name: str) -> None:
        """404 for any other name than that of /v1/models."""
        if name != self.name:
            raise ApiError(
                404,
                f"There is no model {name!r} here; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    @cached_property
    def text_bound(self) -> int:
        """UTF-8 bytes above which no text fits into the context."""
        return text_bound(self.tokenizer, self.engine.context_length)

    def check_text(self, size: int, field: str) -> None:
        """400 for a text of `size` bytes that cannot fit, before the work of tokenizing it."""
        if size > self.text_bound:
            raise ApiError(
                400,
                f"The context holds {self.engine.context_length or 'an unknown number of'} tokens, for which "
                f"at most {self.text_bound} bytes of text are taken, but {field} has {size}.",
                param=field,
                code="context_length_exceeded",
            )


@dataclass(frozen=True)
class Prepared:
    """A request body, what the engine is asked for it, and whether the reply says log-probabilities."""

    body: ChatRequest | CompletionRequest
    asked: list[EngineRequest]
    logprobs: bool


def prepare_chat(model: Model, data: bytes) -> Prepared:
    """From the bytes of a body; raises `ApiError`. Takes long for long texts."""
    body = _parse(ChatRequest, data)
    return Prepared(body, [_chat_request(model, body)], bool(body.logprobs))


def prepare_completion(model: Model, data: bytes) -> Prepared:
    """From the bytes of a body; raises `ApiError`. Takes long for long texts."""
    body = _parse(CompletionRequest, data)
    return Prepared(body, _completion_requests(model, body), body.logprobs is not None)


def _parse(kind: type[Body], data: bytes) -> Body:
    try:
        return kind.model_validate(json.loads(data))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ApiError(
            400, f"The body is not the JSON object expected here: {reason}.", code="invalid_body"
        ) from None


def _chat_request(model: Model, body: ChatRequest) -> EngineRequest:
    """The conversation in the model's chat template; 400 if it has none, refuses it, or it is too long."""
    model.check_name(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise _invalid("max_tokens", "give either this field or max_completion_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("top_logprobs", "it needs logprobs: true")
    if not model.tokenizer.has_chat_template:
        raise ApiError(
            400,
            "This model has no chat template, so it takes no conversations; use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    model.check_text(sum(len(m.content.encode()) for m in body.messages), "messages")
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in body.messages
    ]
    try:
        prompt = model.tokenizer.chat(messages)
    except InputError:
        roles = ", ".join(m["role"] for m in messages)
        raise _invalid("messages", f"the model's chat template refuses this conversation ({roles})") from None
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _request(model, body, prompt, body.limit, top, "messages")


def _completion_requests(model: Model, body: CompletionRequest) -> list[EngineRequest]:
    """One request per prompt; 400 for what is too long or more than the server takes at once."""
    model.check_name(body.model)
    room = model.engine.slots + model.engine.queue
    if len(body.prompt) > room:
        raise _invalid("prompt", f"{len(body.prompt)} prompts, but the server takes at most {room} at once")
    limit = body.max_tokens or COMPLETION_TOKENS
    return [_request(model, body, _ids(model, p), limit, body.logprobs, "prompt") for p in body.prompt]


def _ids(model: Model, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    model.check_text(len(prompt.encode()), "prompt")
    try:
        return model.tokenizer.encode(prompt)
    except InputError as error:
        raise _invalid("prompt", error.message.rstrip(".")) from None


def _check_rows(model: Model, ids: Sequence[int], field: str) -> None:
    """400 for a token the model has no row for; a tokenizer with added tokens can write one."""
    size = model.engine.vocab_size
    unknown = next((i for i in ids if i >= size), None)
    if unknown is None:
        return
    words = f"token {unknown} is outside the model's vocabulary of {size}"
    if unknown < model.tokenizer.size:
        words += f"; the tokenizer writes {model.tokenizer.decode([unknown], special=True)!r} as this token"
    raise _invalid(field, words)


def _request(
    model: Model,
    body: ChatRequest | CompletionRequest,
    prompt: Sequence[int],
    limit: int | None,
    top_logprobs: int | None,
    field: str,
) -> EngineRequest:
    if not prompt:
        raise _invalid(field, "it has no tokens")
    most = _limit(model.engine.context_length, len(prompt), limit, field)
    _check_rows(model, prompt, field)
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    options = GenerateOptions(
        max_tokens=most,
        temperature=temperature,
        top_k=body.top_k or 0,
        # 0 means the smallest set there is, the most likely token; the sampler's range begins above it.
        top_p=top_p or 1e-12,
        seed=secrets.randbits(64) if body.seed is None else body.seed % SEEDS,
        stop_ids=model.tokenizer.eos_ids,
    )
    return EngineRequest(tuple(prompt), options, top_logprobs)


def _limit(context: int, prompt: int, limit: int | None, field: str) -> int:
    if not context:
        return limit or UNLIMITED
    if prompt + (limit or 1) > context:
        asked = f" and {limit} for the reply" if limit else ""
        raise ApiError(
            400,
            f"The context holds {context} tokens, but the request needs more: {prompt} in {field}{asked}.",
            param=field,
            code="context_length_exceeded",
        )
    return limit or context - prompt


def _invalid(field: str, words: str) -> ApiError:
    return ApiError(400, f"The field {field!r} cannot be used: {words}.", param=field, code="invalid_value")
