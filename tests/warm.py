"""Runs Python programs in processes forked from one that has imported what they need: seconds saved for each.

A line of JSON on stdin names a program: `argv` as after `python -m`, its `environment`, and the `log` that
its output is appended to. The answer is its exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback

import onnxruntime_genai.models.builder
import torch
import transformers.models.llama.modeling_llama

import losa_deploy.exporters.onnx.trace
import losa_deploy.sources.checkpoint  # noqa: F401


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
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    assert torch.__version__ and transformers.__version__ and onnxruntime_genai.models.builder
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
