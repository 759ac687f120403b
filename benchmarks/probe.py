"""One model in one fresh process: `python -m losa_deploy.benchmarks.probe` prints one JSON line.

Only what the runtime itself needs is imported (no tokenizer), so that the peak is the model's.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from losa_deploy.errors import LosaError
from losa_deploy.interfaces import Session
from losa_deploy.plugins import load_runtime

from .workloads import prompt_tokens

STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Largest resident set of this process image.

    Linux: VmHWM. `getrusage` would start at the parent's peak there, because a child inherits it
    over vfork and exec; elsewhere it is what there is (bytes on macOS, KiB on other systems).
    """
    try:
        for line in STATUS.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def probe(runtime: str, model: Path, prompt: int, decode: int, threads: int) -> dict[str, float | int]:
    """Open, prefill `prompt` tokens, decode `decode` tokens; seconds and bytes."""
    opener = load_runtime(runtime)
    return probe_session(lambda: opener.open(model, threads=threads), prompt, decode)


def probe_session(open_model: Callable[[], Session], prompt: int, decode: int) -> dict[str, float | int]:
    """What `probe` measures of anything that `open_model` opens in this process."""
    before = int(psutil.Process().memory_info().rss)
    start = time.perf_counter()
    session = open_model()
    loaded = time.perf_counter()
    logits = session.prefill(prompt_tokens(prompt, session.vocab_size))
    first = time.perf_counter()
    for _ in range(decode):
        logits = session.step(int(logits.argmax()))
    end = time.perf_counter()
    session.close()
    return {
        "load_seconds": loaded - start,
        "prefill_seconds": first - loaded,
        "decode_seconds": end - first,
        "peak_rss_bytes": peak_rss_bytes(),
        "before_load_rss_bytes": before,
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, probe, print; a `LosaError` is printed as JSON with its exit code."""
    parser = argparse.ArgumentParser(prog="losa_deploy.benchmarks.probe", description=__doc__)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        result = probe(options.runtime, options.model, options.prompt_tokens, options.decode, options.threads)
    except LosaError as error:
        sys.stderr.write(json.dumps(error.to_json()) + "\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
