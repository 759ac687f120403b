"""The other end of `process_session.py`: answers each line of JSON on stdin with a line of JSON and logits.

With a probe it measures what the model costs instead, and prints what `probe.py` prints.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import BinaryIO

from losa_deploy.errors import LosaError
from losa_deploy.interfaces import Session

from .probe import probe_session


def answer(open_model: Callable[[], Session], probe: Sequence[int] | None) -> int:
    """Serve the model, or probe it with so many tokens of prompt and of reply.

    Returns the exit code; a `LosaError` is JSON on stderr. Libraries also print to stdout, where only answers
    may be: what they print goes to stderr.
    """
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            if probe:
                costs = probe_session(open_model, *probe)
                answers.write(json.dumps(costs).encode() + b"\n")
            else:
                serve(open_model(), sys.stdin.buffer, answers)
        except LosaError as error:
            sys.stderr.write("\n" + json.dumps(error.to_json()) + "\n")
            return error.exit_code
    return 0


def serve(model: Session, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until `requests` ends; the first line says what was opened."""
    _send(answers, {"vocab_size": model.vocab_size})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "step":
            found = model.step(request["token"])
        elif request["do"] == "prefill":
            found = model.prefill(request["tokens"])
        else:
            found = model.logits(request["tokens"])
        _send(answers, {"bytes": found.nbytes}, found.tobytes())


def _send(answers: BinaryIO, header: dict[str, int], body: bytes = b"") -> None:
    answers.write(json.dumps(header).encode() + b"\n" + body)
    answers.flush()
