"""Quantize a GGUF file with llama.cpp.

Run as `python -m losa_deploy.benchmarks.quantize SOURCE TARGET TYPE THREADS`.
"""

from __future__ import annotations

import sys

import llama_cpp


def quantize(source: str, target: str, kind: str, threads: int) -> int:
    """llama.cpp's status, 0 if all went well; `kind` is e.g. q4_k_m."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    parameters.nthread = threads
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


if __name__ == "__main__":
    sys.exit(quantize(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
