"""What computes tokens behind the HTTP layer: requests in, tokens out, a bounded queue between."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..generate import GenerateOptions, pick
from ..speculation import Counts

FinishReason = Literal["stop", "length"]
Log = Callable[[str], None]
LONGEST_RETRY = 30


class Busy(Exception):
    """No room for the request; `retry_after` is a guess in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("all slots and all places in the queue are taken")
        self.retry_after = retry_after


class EngineFailure(Exception):
    """The runtime failed at a request; the cause was logged."""


@dataclass(frozen=True)
class EngineRequest:
    """A prompt and how to continue it. `top_logprobs` None: no log-probabilities."""

    prompt: tuple[int, ...]
    options: GenerateOptions
    top_logprobs: int | None = None


@dataclass(frozen=True)
class EngineToken:
    """One token; log-probabilities are of the model's own distribution (temperature 1, all tokens)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is going on now."""

    active: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Ticket:
    """One accepted request: an asynchronous iterator of its tokens, made in the event loop that reads it."""

    def __init__(self, request: EngineRequest, on_cancel: Callable[[Ticket], None]) -> None:
        self.request = request
        self.finish: FinishReason | None = None
        """Why it ended; None while it has not."""
        self.cancelled = False
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[EngineToken | FinishReason | EngineFailure] = asyncio.Queue()

    def put(self, item: EngineToken | FinishReason | EngineFailure) -> None:
        """From the worker: a token, the reason of the end, or a failure."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled = True

    def cancel(self) -> None:
        """No more tokens are wanted. Harmless after the end."""
        if self.finish is None and not self.cancelled:
            self.cancelled = True
            self._on_cancel(self)

    async def __aiter__(self) -> AsyncIterator[EngineToken]:
        """The tokens as they come; raises `EngineFailure`."""
        while True:
            item = await self._items.get()
            if isinstance(item, EngineToken):
                yield item
            elif isinstance(item, EngineFailure):
                raise item
            else:
                self.finish = item
                return


class Engine(Protocol):
    """What the HTTP layer needs."""

    name: str
    slots: int
    queue: int
    context_length: int
    """The most tokens of prompt and reply together; 0 if unlimited."""
    vocab_size: int

    def submit(self, requests: Sequence[EngineRequest]) -> list[Ticket]:
        """Accept all of `requests` or none; raises `Busy`. Called in the event loop."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        ...

    def close(self) -> None:
        """Stop the worker and free the model."""
        ...


class Course:
    """A request in progress: samples, hands tokens on, knows when it is over."""

    def __init__(self, ticket: Ticket, context_length: int, count: Callable[[], None]) -> None:
        """`count` is called once for each token handed on."""
        options = ticket.request.options
        self.ticket = ticket
        self._count = count
        self.prompt = ticket.request.prompt
        self.end: FinishReason | EngineFailure | None = None
        """Why it is over; None while it is not, and for a cancelled one."""
        self._random = np.random.default_rng(options.seed)
        self._left = options.max_tokens
        if context_length:
            self._left = min(self._left, context_length - len(self.prompt) + 1)

    def take(self, logits: NDArray[np.float32]) -> int | None:
        """The next token after `logits` [vocab], or None if the request has ended (or was cancelled)."""
        request = self.ticket.request
        if self.ticket.cancelled:
            return None
        if self._left <= 0:
            return self._ended("length")
        token = pick(logits, request.options, self._random)
        if token in request.options.stop_ids:
            return self._ended("stop")
        self.ticket.put(describe(token, logits, request.top_logprobs))
        self._count()
        self._left -= 1
        return token if self._left else self._ended("length")

    def _ended(self, reason: FinishReason) -> int | None:
        self.end = reason
        return None


def describe(token: int, logits: NDArray[np.float32], top: int | None) -> EngineToken:
    """The token with its log-probability and those of the `top` most likely tokens, if wanted."""
    if top is None:
        return EngineToken(token)
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(float(np.exp(values).sum()))
    best = np.argsort(-values, kind="stable")[:top]
    return EngineToken(token, float(values[token]), tuple((int(i), float(values[i])) for i in best))


@dataclass
class _Counters:
    active: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    mean_seconds: float = 1.0
    started: dict[Ticket, float] = field(default_factory=dict)


class ThreadedEngine(ABC):
    """A worker thread beside the event loop, and the bounded queue between the two."""

    def __init__(
        self, name: str, *, slots: int, queue: int, context_length: int, vocab_size: int, log: Log
    ) -> None:
        self.name = name
        self.slots = slots
        self.queue = queue
        self.context_length = context_length
        self.vocab_size = vocab_size
        self._log = log
        self._condition = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._counters = _Counters()
        self._counts = Counts()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="losa-engine", daemon=True)

    def start(self) -> None:
        """Start the worker; called once, when the subclass is complete."""
        self._thread.start()

    def submit(self, requests: Sequence[EngineRequest]) -> list[Ticket]:
        """Accept all of `requests` or none; raises `Busy`."""
        with self._condition:
            room = self.queue + self.slots - self._counters.active - len(self._waiting)
            if self._closed or len(requests) > room:
                raise Busy(self._retry_after())
            tickets = [Ticket(request, self._cancel) for request in requests]
            self._waiting.extend(tickets)
            self._condition.notify()
        return tickets

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        with self._condition:
            c = self._counters
            return EngineStats(
                c.active,
                len(self._waiting),
                c.prompt_tokens,
                c.generated_tokens,
                c.cached_tokens,
                self._counts.drafted,
                self._counts.accepted,
            )

    def close(self) -> None:
        """Let the worker end after its present step, fail what waits, free the model."""
        with self._condition:
            self._closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._condition.notify()
        for ticket in waiting:
            ticket.put(EngineFailure("the server is shutting down"))
        self._thread.join()
        self._free()

    @abstractmethod
    def _work(self) -> None:
        """The worker's loop; returns when `_closed`."""

    @abstractmethod
    def _free(self) -> None:
        """Free the model."""

    def _next(self, *, wait: bool) -> Ticket | None:
        """The next waiting request, now active; None if there is none (or the engine is closed)."""
        with self._condition:
            while wait and not self._waiting and not self._closed:
                self._condition.wait()
            if self._closed or not self._waiting:
                return None
            ticket = self._waiting.popleft()
            self._counters.active += 1
            self._counters.started[ticket] = time.monotonic()
            return ticket

    def _done(self, ticket: Ticket, end: FinishReason | EngineFailure | None) -> None:
        """An active request has ended: its place is free before its client learns of it."""
        with self._condition:
            counters = self._counters
            counters.active -= 1
            seconds = time.monotonic() - counters.started.pop(ticket)
            counters.mean_seconds += 0.2 * (seconds - counters.mean_seconds)
        if end is not None:
            ticket.put(end)

    def _count_token(self) -> None:
        with self._condition:
            self._counters.generated_tokens += 1

    def _count_prompt(self, tokens: int, *, cached: int = 0) -> None:
        with self._condition:
            self._counters.prompt_tokens += tokens
            self._counters.cached_tokens += cached

    def _cancel(self, ticket: Ticket) -> None:
        """Give the place in the queue back at once; an active request ends at its next step."""
        with self._condition:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _retry_after(self) -> int:
        ahead = (len(self._waiting) + 1) / self.slots
        return max(1, min(LONGEST_RETRY, math.ceil(ahead * self._counters.mean_seconds)))
