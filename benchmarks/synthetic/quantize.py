"""Quantize a GGUF file with llama.cpp.

Run as `python -m losa_deploy.benchmarks.synthetic.quantize SOURCE TARGET TYPE THREADS [IMPORTANCE]`, the last
a file of `imatrix.py`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as library
from numpy.typing import NDArray


def quantize(
    source: str,
    target: str,
    kind: str,
    threads: int,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
) -> int:
    """llama.cpp's status, 0 if all went well; `kind` is e.g. q4_k_m.

    `importance` is tensor name → weight [in] of each column's error.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    parameters.nthread = threads
    entries = _entries(importance or {})
    if importance:
        parameters.imatrix = entries
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters))


def _entries(importance: Mapping[str, NDArray[np.float32]]) -> ctypes.Array[Any]:
    """The list that llama.cpp reads up to an entry without a name; it holds the arrays."""
    kind = library.llama_model_imatrix_data
    entries: ctypes.Array[Any] = (kind * (len(importance) + 1))()
    for entry, (name, weights) in zip(entries, importance.items(), strict=False):
        values = (ctypes.c_float * len(weights))(*weights.tolist())
        entry.name, entry.size = name.encode(), len(weights)
        entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    return entries


def main(arguments: list[str]) -> int:
    """The command line above; the exit code is llama.cpp's status."""
    importance = None
    if len(arguments) > 4:
        from safetensors.numpy import load_file

        importance = load_file(arguments[4])
    return quantize(arguments[0], arguments[1], arguments[2], int(arguments[3]), importance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
