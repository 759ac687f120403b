"""The endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from .answers import ModelCard, ModelList, usage
from .engine import Busy, EngineFailure, Log, Ticket
from .errors import SERVER, ApiError, internal_error
from .gate import BODY, OUTCOME, Gate
from .metrics import CONTENT_TYPE, Metrics
from .prepare import Model, Prepared, prepare_chat, prepare_completion
from .text import Reply
from .workers import Workers
from .writers import ChatWriter, TextWriter, Whole, Writer, collect

CLIENT_LEFT = 499
"""Status of an answer that nobody reads, as nginx logs it."""
CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
POSTS = frozenset({CHAT, COMPLETIONS})
PATHS = POSTS | {MODELS, "/health", "/metrics"}
T = TypeVar("T")


def create_app(model: Model, *, key: str, log: Log, access: Log) -> FastAPI:
    """The application; `log` gets what went wrong, `access` a line per request.

    `app.state.loopback` is for whoever runs it: the name by which loopback is bound, if it is.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.loopback = None
    metrics = Metrics()
    app.add_middleware(Gate, key=key, metrics=metrics, paths=PATHS, posts=POSTS, log=access)
    _add_handlers(app)
    _add_facts(app, model, metrics)
    answering = _Answering(model, metrics, log)
    _ = model.text_bound  # reads the whole vocabulary: now, and not while the first request waits

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await answering(request, prepare_chat, ChatWriter)

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await answering(request, prepare_completion, TextWriter)

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
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _full(retry_after: int) -> ApiError:
    return ApiError(
        503,
        "All slots and all places in the queue are taken; try again later.",
        kind=SERVER,
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


class _Answering:
    """What both completion endpoints do with a request."""

    def __init__(self, model: Model, metrics: Metrics, log: Log) -> None:
        self._model = model
        self._metrics = metrics
        self._log = log
        self._workers = Workers(model.engine.slots + model.engine.queue)

    async def __call__(
        self,
        request: Request,
        prepare: Callable[[Model, bytes], Prepared],
        write: Callable[[str, bool], Writer],
    ) -> Response:
        start = time.monotonic()
        try:
            prepared = await self._prepared(request, prepare)
            tickets = self._model.engine.submit(prepared.asked)
        except Busy as busy:
            raise _full(busy.retry_after) from None
        except ClientLeft:
            request.scope[OUTCOME] = "cancelled"
            return Response(status_code=CLIENT_LEFT)
        body, writer = prepared.body, write(self._model.name, prepared.logprobs)
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
        prompt_tokens = sum(len(a.prompt) for a in prepared.asked)
        return JSONResponse(writer.whole(answers, prompt_tokens).model_dump())

    async def _prepared(self, request: Request, prepare: Callable[[Model, bytes], Prepared]) -> Prepared:
        """Raises `Busy`, `ClientLeft` and `ApiError`."""
        data = request.scope.pop(BODY)
        work = self._workers.run(len(data), partial(prepare, self._model, data))
        return await _while_connected(request, work)

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
