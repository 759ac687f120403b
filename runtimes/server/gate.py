"""What every request passes first: its host, key, type, and body, the counters and the log."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Log
from .errors import SERVER, ApiError
from .hosts import host_name, is_loopback
from .metrics import Metrics

LARGEST_BODY = 16 << 20
BODY_SECONDS = 60
"""How long a client may take for its body."""
LINGER_SECONDS = 2
LINGER_BYTES = 64 << 20
"""How long the rest of a refused body is read, and how much of it."""
OPEN = ("/health",)
"""Paths that need no key, so that a supervisor can ask."""
OUTCOME = "losa.outcome"
"""Key of the scope under which a handler says that the client left."""
BODY = "losa.body"
"""Key of the scope under which a handler finds the whole body, once."""


class Gate:
    """ASGI middleware; `key` empty: everybody may ask. Only `posts` of the `paths` take a body."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str,
        metrics: Metrics,
        paths: frozenset[str],
        posts: frozenset[str],
        log: Log,
    ) -> None:
        self._app = app
        self._key = key.encode()
        self._metrics = metrics
        self._paths = paths
        self._posts = posts
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; count it in either case."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except asyncio.CancelledError:
            # The server ends and has waited long enough; uvicorn would log it as a failure.
            scope[OUTCOME] = "cancelled"
            if not status:
                await _refuse(_ending(), scope, receive, watched, linger=0)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            outcome = str(scope.get(OUTCOME) or status or 500)
            self._metrics.requests[path, outcome] += 1
            seconds = time.monotonic() - start
            self._log(f"{scope['method']} {path} {outcome} {seconds:.3f} s")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            self._check_host(scope, headers)
            self._check_key(scope, headers)
            if scope["method"] == "POST" and scope["path"] in self._posts:
                _check_type(headers)
                body = await _body(headers, receive)
                if body is None:
                    scope[OUTCOME] = "cancelled"
                    return
                scope[BODY] = body
                del body
        except ApiError as refusal:
            await _refuse(refusal, scope, receive, send, linger=LINGER_SECONDS)
            return
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """403 for a foreign name, where no key and no address beyond loopback lets others in anyway."""
        bound: str | None = scope["app"].state.loopback
        if self._key or bound is None or b"host" not in headers:
            return
        name = host_name(headers[b"host"])
        if not is_loopback(name) and name != bound:
            raise ApiError(
                403,
                f"This server answers to localhost, not to {name!r}; with --api-key it answers to any name.",
                code="host_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        if not self._key or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
            what = "is wrong" if given else "is missing"
            raise ApiError(
                401,
                f"The API key {what}; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if given == b"application/json" or (given.startswith(b"application/") and given.endswith(b"+json")):
        return
    found = f"is {given.decode('latin-1')!r}" if given else "is missing"
    raise ApiError(
        415,
        f"The Content-Type {found}; send the body as `Content-Type: application/json`.",
        code="unsupported_media_type",
    )


async def _body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
    """The whole body; None if the client left. Raises `ApiError` if it is too large or too slow."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > LARGEST_BODY:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > LARGEST_BODY:
                    raise _too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"The body was not complete after {BODY_SECONDS} seconds.", code="body_timeout"
        ) from None


def _too_large() -> ApiError:
    return ApiError(413, f"The body has more than {LARGEST_BODY} bytes.", code="body_too_large")


def _ending() -> ApiError:
    return ApiError(503, "The server is shutting down.", kind=SERVER, code="shutting_down")


async def _refuse(refusal: ApiError, scope: Scope, receive: Receive, send: Send, *, linger: float) -> None:
    """Answer and close the connection, but read on for up to `linger` seconds before that.

    A connection that is closed with unread bytes is reset, and a client that still sends may then never
    see the answer.
    """

    async def unfinished(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    answer = JSONResponse(refusal.body(), refusal.status, {**refusal.headers, "Connection": "close"})
    await answer(scope, receive, unfinished)
    if linger:
        await _drain(receive, linger)
    await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Receive, seconds: float) -> None:
    """Read and drop what still comes."""
    left = LINGER_BYTES
    try:
        async with asyncio.timeout(seconds):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
