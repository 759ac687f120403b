"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import ModelCard, ModelList, usage
from .engine import Busy, EngineFailure, EngineRequest, Log, Ticket
from .errors import ApiError, internal_error, validation_error
from .gate import OUTCOME, Gate
from .metrics import CONTENT_TYPE, Metrics
from .prepare import Model, chat_request, completion_requests
from .schema import ChatRequest, CompletionRequest
from .text import Reply
from .writers import ChatWriter, TextWriter, Whole, Writer, collect

CLIENT_LEFT = 499
"""Status of an answer that nobody reads, as nginx logs it."""
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
PATHS = frozenset({CHAT, COMPLETIONS, MODELS, "/health", "/metrics"})
T = TypeVar("T")


def create_app(model: Model, *, key: str, log: Log, access: Log) -> FastAPI:
    """The application; `log` gets what went wrong, `access` a line per request."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics()
    app.add_middleware(Gate, key=key, metrics=metrics, paths=PATHS, log=access)
    _add_handlers(app)
    _add_facts(app, model, metrics)
    answering = _Answering(model, metrics, log)

    @app.post(CHAT)
    async def chat(request: Request, body: ChatRequest) -> Response:
        asked = [chat_request(model, body)]
        writer = ChatWriter(model.name, bool(body.logprobs))
        return await answering(request, body, asked, writer)

    @app.post(COMPLETIONS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        asked = completion_requests(model, body)
        writer = TextWriter(model.name, body.logprobs is not None)
        return await answering(request, body, asked, writer)

    return app


def _add_facts(app: FastAPI, model: Model, metrics: Metrics) -> None:
    card = ModelCard(id=model.name, created=model.created)

    @app.get(MODELS)
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get(MODELS + "/{name:path}")
    async def one_model(name: str) -> ModelCard:
        model.check_name(name)
        return card

    @app.get("/health")
    async def health() -> dict[str, object]:
        stats = model.engine.stats()
        return {
            "status": "ok",
            "slots": model.engine.slots,
            "active": stats.active,
            "waiting": stats.waiting,
        }

    @app.get("/metrics")
    async def counters() -> Response:
        return PlainTextResponse(metrics.text(model.engine), media_type=CONTENT_TYPE)


def _add_handlers(app: FastAPI) -> None:
    """Every refusal and failure in OpenAI's form; the server logs what is unexpected."""

    async def api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _refusal(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _refusal(validation_error(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {
            404: f"There is no {request.url.path} here.",
            405: f"{request.url.path} does not take {request.method}.",
        }
        message = words.get(error.status_code, str(error.detail))
        return _refusal(ApiError(error.status_code, message, code="http_error", headers=error.headers))

    async def unexpected(request: Request, error: Exception) -> Response:
        return _refusal(internal_error())

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


class _Answering:
    """What both completion endpoints do with the requests they prepared."""

    def __init__(self, model: Model, metrics: Metrics, log: Log) -> None:
        self._model = model
        self._metrics = metrics
        self._log = log

    async def __call__(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        asked: Sequence[EngineRequest],
        writer: Writer,
    ) -> Response:
        start = time.monotonic()
        try:
            tickets = self._model.engine.submit(asked)
        except Busy as busy:
            raise ApiError(
                503,
                "All slots and all places in the queue are taken; try again later.",
                kind="server_error",
                code="queue_full",
                headers={"Retry-After": str(busy.retry_after)},
            ) from None
        replies = [Reply(ticket, self._model.tokenizer, body.stop) for ticket in tickets]
        if body.stream:
            counted = body.stream_options is not None and bool(body.stream_options.include_usage)
            events = self._events(replies, writer, counted, start)
            return EventStream(events, request, tickets)
        try:
            answers = await _while_connected(request, _all(replies))
        except EngineFailure:
            raise internal_error() from None
        except ClientLeft:
            request.scope[OUTCOME] = "cancelled"
            return Response(status_code=CLIENT_LEFT)
        finally:
            for ticket in tickets:
                ticket.cancel()
        self._time(start, first=False)
        prompt_tokens = sum(len(a.prompt) for a in asked)
        return JSONResponse(writer.whole(answers, prompt_tokens).model_dump())

    async def _events(
        self, replies: Sequence[Reply], writer: Writer, counted: bool, start: float
    ) -> AsyncIterator[str]:
        """Server-sent events; a failure becomes an `error` event in the place of `[DONE]`."""
        extra: dict[str, object] = {"usage": None} if counted else {}
        waiting = True
        try:
            for index, reply in enumerate(replies):
                opening = writer.opening(index)
                if opening is not None:
                    yield _event(opening, extra)
                async for piece in reply.pieces():
                    if waiting:
                        waiting = False
                        self._time(start, first=True)
                    yield _event(writer.piece(index, piece), extra)
                yield _event(writer.closing(index, reply), extra)
        except EngineFailure:
            yield f"data: {json.dumps(internal_error().body())}\n\n"
            return
        except Exception:
            self._log_failure()
            yield f"data: {json.dumps(internal_error().body())}\n\n"
            return
        if counted:
            prompt = sum(len(r.ticket.request.prompt) for r in replies)
            counts = usage(prompt, sum(r.tokens for r in replies))
            yield _event(writer.counts(), {"usage": counts.model_dump()})
        self._time(start, first=False)
        yield "data: [DONE]\n\n"

    def _log_failure(self) -> None:
        import traceback

        self._log(traceback.format_exc())

    def _time(self, start: float, *, first: bool) -> None:
        seconds = time.monotonic() - start
        if first:
            self._metrics.first_tokens += 1
            self._metrics.first_token_seconds += seconds
        else:
            self._metrics.finished += 1
            self._metrics.seconds += seconds


def _event(document: BaseModel, extra: dict[str, object]) -> str:
    return f"data: {json.dumps({**document.model_dump(), **extra}, ensure_ascii=False)}\n\n"


async def _all(replies: Sequence[Reply]) -> list[Whole]:
    return [await collect(reply) for reply in replies]


class ClientLeft(Exception):
    """The connection was closed before the answer was complete."""


async def _while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`; raises `ClientLeft`, and stops working, when the client goes."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A stream that gives its tickets back however it ends."""

    def __init__(self, events: AsyncIterator[str], request: Request, tickets: Sequence[Ticket]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._request = request
        self._tickets = tickets
        self._complete = False
        self._inner = events
        self.body_iterator = self._watched()

    async def _watched(self) -> AsyncIterator[str]:
        async for event in self._inner:
            yield event
        self._complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the tickets are cancelled if the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._complete:
                scope[OUTCOME] = "cancelled"
            for ticket in self._tickets:
                ticket.cancel()
