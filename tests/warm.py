"""Runs Python programs in processes forked from one that has imported what they need: seconds saved for each.

A line of JSON on stdin names a program: `argv` as after `python -m`, or with the path of a script; its
`environment`; the `log` that its output is appended to; and how many processes of it to start as `torchrun`
does, none if it is alone. The answer is the exit code; of several processes that of the first that failed.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback

import onnxruntime_genai.models.builder
import torch
import transformers.models.llama.modeling_llama

import losa_deploy.exporters.onnx.trace
import losa_deploy.sources.checkpoint  # noqa: F401

SECONDS = 600
"""Several processes can wait for each other for ever: then they are ended."""


def run(argv: list[str], environment: dict[str, str], log: str) -> int:
    """What the forked process does: `python -m`, as far as a program can tell."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(stream, target)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = argv
    try:
        if argv[0].endswith(".py"):
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def environments(count: int) -> list[dict[str, str]]:
    """What each of several processes is told, by the names of `torchrun`."""
    if not count:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def forked(argv: list[str], environment: dict[str, str], log: str, count: int) -> int:
    """The exit code of forked processes that run a program; when one fails, the others are ended."""
    children = []
    for more in environments(count):
        child = os.fork()
        if not child:
            signal.alarm(SECONDS if count else 0)
            code = run(argv, {**environment, **more}, log)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        failed = failed or os.waitstatus_to_exitcode(status)
        for other in children if failed else ():
            os.kill(other, signal.SIGKILL)
    return failed


def main() -> None:
    assert torch.__version__ and transformers.__version__ and onnxruntime_genai.models.builder
    for line in sys.stdin:
        sys.stdout.write(f"{forked(**json.loads(line))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
