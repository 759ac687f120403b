"""From a checked request body to what the engine is asked: prompt ids, sampling, limits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from losa_deploy.errors import InputError
from losa_deploy.text import Tokenizer

from ..generate import GenerateOptions
from .engine import Engine, EngineRequest
from .errors import ApiError
from .schema import ChatRequest, CompletionRequest

COMPLETION_TOKENS = 16
"""What /v1/completions generates if the request gives no limit, as OpenAI's does."""
UNLIMITED = 4096
"""Where the model does not say how long its context is."""
SEEDS = 2**64


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


def chat_request(model: Model, body: ChatRequest) -> EngineRequest:
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


def completion_requests(model: Model, body: CompletionRequest) -> list[EngineRequest]:
    """One request per prompt; 400 for what is too long or more than the server takes at once."""
    model.check_name(body.model)
    room = model.engine.slots + model.engine.queue
    if len(body.prompt) > room:
        raise _invalid("prompt", f"{len(body.prompt)} prompts, but the server takes at most {room} at once")
    limit = body.max_tokens or COMPLETION_TOKENS
    return [_request(model, body, _ids(model, p), limit, body.logprobs, "prompt") for p in body.prompt]


def _ids(model: Model, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    unknown = next((i for i in prompt if i >= model.engine.vocab_size), None)
    if unknown is not None:
        raise _invalid("prompt", f"token {unknown} is outside the vocabulary of {model.engine.vocab_size}")
    return prompt


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
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    options = GenerateOptions(
        max_tokens=_limit(model.engine.context_length, len(prompt), limit, field),
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
