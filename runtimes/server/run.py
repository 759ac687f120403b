"""From an address to a running server: the socket, uvicorn, a quiet end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from losa_deploy.errors import UsageError

from .engine import Log
from .hosts import is_loopback
from .protocol import Protocol

GRACE_SECONDS = 10
"""How long requests that run may go on after Ctrl-C."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Listening(socket.socket):
    """A bound socket that knows the name it was bound by."""

    name = ""


def bind(host: str, port: int) -> Listening:
    """A socket bound to the address, before a model is loaded; `UsageError` if it is not to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = Listening(family, kind, protocol)
        found.name = host.lower()
    except OSError as error:
        raise UsageError(
            f"The host {host!r} cannot be used: {error.strerror or error}.", hint="Check --host."
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        # Listening makes the port ours: two programs may bind the same address until one listens.
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"Port {port} on {host} is in use by another program.",
                hint="Choose another one with --port (0: any free one).",
            ) from None
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {error.strerror}.", hint="Check --host and --port."
        ) from None
    return found


def url(listening: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def configuration(app: FastAPI, listening: Listening) -> uvicorn.Config:
    """uvicorn's settings; the app learns whether it is bound to loopback."""
    if is_loopback(listening.getsockname()[0]):
        app.state.loopback = listening.name
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def run(app: FastAPI, listening: Listening, *, ready: Callable[[], None], log: Log) -> None:
    """Serve until Ctrl-C or SIGTERM; `ready` is called once requests are answered."""
    handler = _Lines(log)
    for name in ("uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING)
    server = _Server(configuration(app, listening), ready)
    asyncio.run(server.serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """Ends quietly where uvicorn would raise the signal again that stopped it."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A first signal lets running requests end, a second one does not."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Lines(logging.Handler):
    """A log handler that hands lines to a function."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Format and pass on."""
        self._log(self.format(record))
