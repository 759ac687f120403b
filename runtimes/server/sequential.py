"""One request at a time over any `Session`; the others wait in the queue."""

from __future__ import annotations

import traceback

from losa_deploy.interfaces import Session

from ..speculation import Drafts, speculative
from .engine import Course, EngineFailure, Log, ThreadedEngine


class QueueEngine(ThreadedEngine):
    """For runtimes whose session holds a single sequence."""

    def __init__(
        self,
        name: str,
        session: Session,
        *,
        queue: int,
        context: int,
        log: Log,
        drafts: Drafts | None = None,
    ) -> None:
        """Takes `session` and `drafts` over; `context` 0: as long as the model allows."""
        limit = min(context or session.context_length, session.context_length or context)
        super().__init__(
            name, slots=1, queue=queue, context_length=limit, vocab_size=session.vocab_size, log=log
        )
        self._session = speculative(session, drafts, self._counts)
        self.start()

    def _work(self) -> None:
        while (ticket := self._next(wait=True)) is not None:
            course = Course(ticket, self.context_length, self._count_token)
            try:
                self._serve(course)
            except Exception:
                self._log(traceback.format_exc())
                course.end = EngineFailure("the runtime failed")
            finally:
                self._done(ticket, course.end)

    def _serve(self, course: Course) -> None:
        if course.ticket.cancelled:
            return
        logits = self._session.prefill(course.prompt)
        self._count_prompt(len(course.prompt))
        while (token := course.take(logits)) is not None:
            if self._closed:
                course.end = EngineFailure("the server is shutting down")
                return
            logits = self._session.step(token)

    def _free(self) -> None:
        self._session.close()
