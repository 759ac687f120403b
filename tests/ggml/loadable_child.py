"""Runs a model in prebuilt libraries with loadable backends: FOLDER MODEL LOGITS.

It knows nothing of the plug-in: ggml itself reads GGML_BACKEND_PATH. Parameter structures differ between
versions of llama.cpp and are passed on as they come, in more room than any has.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_int, c_int32, c_void_p
from pathlib import Path

import numpy as np

TOKENS, VOCAB = 40, 320


class Parameters(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class Batch(ctypes.Structure):
    _fields_ = [("count", c_int32), *((name, c_void_p) for name in "abcdef")]


def main() -> None:
    folder, model_path, logits_path = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    ctypes.CDLL(str(folder / "libggml-base.so"))
    ggml = ctypes.CDLL(str(next(folder.glob("libggml.*so"))))
    llama = ctypes.CDLL(str(next(folder.glob("libllama.*so"))))
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    signatures: dict[str, tuple[type, list[type]]] = {
        "llama_model_default_params": (Parameters, []),
        "llama_context_default_params": (Parameters, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
        "llama_init_from_model": (c_void_p, [c_void_p, Parameters]),
        "llama_batch_get_one": (Batch, [c_void_p, c_int32]),
        "llama_decode": (c_int, [c_void_p, Batch]),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [c_void_p, c_int32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    parameters = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(model_path.encode(), parameters)
    context = llama.llama_init_from_model(model, llama.llama_context_default_params())
    tokens = (c_int32 * TOKENS)(*range(1, TOKENS + 1))
    assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, TOKENS)) == 0
    np.save(logits_path, np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (VOCAB,)))


main()
