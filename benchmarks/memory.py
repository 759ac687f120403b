"""Peak memory and load time of a model in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.errors import LosaError, ResourceError


@dataclass(frozen=True)
class Footprint:
    """What a fresh process that opens a model and writes a few tokens costs."""

    peak_rss_bytes: int
    before_load_rss_bytes: int
    """Interpreter and libraries alone."""
    load_seconds: float
    prefill_seconds: float
    decode_seconds: float


def measure_footprint(
    runtime: str,
    model: Path,
    *,
    prompt_tokens: int = 64,
    decode_tokens: int = 16,
    threads: int = 0,
    timeout: float = 600.0,
) -> Footprint:
    """Run the probe in a subprocess.

    Raises `ResourceError` if the system killed it (SIGKILL: out of memory), `LosaError` with the
    last line of its stderr if it failed otherwise.
    """
    command = [sys.executable, "-m", "losa_deploy.benchmarks.probe"]
    command += ["--runtime", runtime, "--model", str(model), "--threads", str(threads)]
    command += ["--prompt-tokens", str(prompt_tokens), "--decode", str(decode_tokens)]
    return run_probe(command, model, timeout)


def run_probe(command: Sequence[str], model: Path, timeout: float) -> Footprint:
    """Run one probe command and read its JSON line; errors as in `measure_footprint`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"Opening {model} in a fresh process took more than {timeout:g} s.",
            hint="Try fewer tokens, or a smaller model.",
        ) from None
    if done.returncode == -signal.SIGKILL:
        raise ResourceError(
            f"The process opening {model} was killed: out of memory.",
            hint="Close other programs, or use a machine with more memory.",
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = error_message(lines[-1])
        raise LosaError(
            f"The process opening {model} failed with exit code {done.returncode}: {reason}",
            hint=f"Run `{' '.join(command)}` to see more.",
        )
    return Footprint(**json.loads(done.stdout.strip().splitlines()[-1]))


def error_message(line: str) -> str:
    """The message in a `losa.error` document that a process ended with, or its last line."""
    try:
        document = json.loads(line)
    except ValueError:
        return line
    return str(document["message"]) if isinstance(document, dict) and "message" in document else line
