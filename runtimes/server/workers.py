"""Threads that parse and tokenize requests, so that the event loop answers others meanwhile.

Tokenizers release the interpreter while they work: those of transformers in Rust, llama.cpp's because
ctypes calls it. What is written in Python (templates, validation) is interrupted every few milliseconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .engine import Busy

SMALL = 4 << 10
"""Bytes of a body that is read in the event loop: a few milliseconds at most."""
LARGE = 256 << 10
"""Bytes of a body from which on one is read at a time: tokenizing takes up to 120 bytes per byte."""
T = TypeVar("T")


class Workers:
    """Two threads for bodies of middle size, one for large ones, so that these never hold up the others."""

    def __init__(self, room: int) -> None:
        """`room`: the most bodies that are read or wait for it."""
        self._room = room
        self._middle = ThreadPoolExecutor(2, "losa-read")
        self._large = ThreadPoolExecutor(1, "losa-read-large")

    async def run(self, size: int, job: Callable[[], T]) -> T:
        """The result of `job`, which reads a body of `size` bytes; raises `Busy`.

        If this is cancelled, a job that waits is dropped; one that runs ends in its thread, and holds
        its place there until then.
        """
        if size <= SMALL:
            return job()
        if not self._room:
            raise Busy(1)
        threads = self._middle if size < LARGE else self._large
        self._room -= 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, job)
        finally:
            self._room += 1
