"""What every request passes first: the key, the size of its body, the counters and the log."""

from __future__ import annotations

import hmac
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Log
from .errors import ApiError
from .metrics import Metrics

LARGEST_BODY = 16 << 20
OPEN = ("/health",)
"""Paths that need no key, so that a supervisor can ask."""
OUTCOME = "losa.outcome"
"""Key of the scope under which a handler says that the client left."""


class Gate:
    """ASGI middleware; `key` empty: everybody may ask."""

    def __init__(self, app: ASGIApp, *, key: str, metrics: Metrics, paths: frozenset[str], log: Log) -> None:
        self._app = app
        self._key = key.encode()
        self._metrics = metrics
        self._paths = paths
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
            refusal = self._refusal(scope)
            if refusal is not None:
                answer = JSONResponse(refusal.body(), refusal.status, refusal.headers)
                await answer(scope, receive, watched)
            else:
                await self._app(scope, _limited(receive), watched)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            outcome = str(scope.get(OUTCOME) or status or 500)
            self._metrics.requests[path, outcome] += 1
            seconds = time.monotonic() - start
            self._log(f"{scope['method']} {path} {outcome} {seconds:.3f} s")

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
                what = "is wrong" if given else "is missing"
                return ApiError(
                    401,
                    f"The API key {what}; send it as `Authorization: Bearer KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        size = headers.get(b"content-length", b"0")
        if size.isdigit() and int(size) > LARGEST_BODY:
            return ApiError(413, f"The body has more than {LARGEST_BODY} bytes.", code="body_too_large")
        return None


def _limited(receive: Receive) -> Receive:
    """Ends a body without a declared length where it grows too large."""
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LARGEST_BODY:
            raise ApiError(413, f"The body has more than {LARGEST_BODY} bytes.", code="body_too_large")
        return message

    return limited
