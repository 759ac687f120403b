"""MUL_MAT cases through ggml, in a process of its own because a route is chosen once: CASES.npz RESULTS.npz.

A case `i` is `w_i` (bytes of the weight), `x_i` [batch, tokens, columns] and `spec_i`: type, rows, threads,
and how x lies in memory (0 contiguous, 1 with gaps between rows, 2 transposed). Its result is `y_i` and
`w_i`, the bytes read back.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from losa_deploy.ggml import load_plugin

LOADABLE = os.environ.get("LOSA_TEST_LIBRARIES")
"""Folder of libraries with loadable backends; without it, those of llama-cpp-python."""


def libraries() -> list[ctypes.CDLL]:
    """libggml-base and libggml with the CPU backend; loadable ones read GGML_BACKEND_PATH here."""
    if LOADABLE is None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        return [ctypes.CDLL(str(folder / f"lib{name}.so.0")) for name in ("ggml-base", "ggml")]
    ggml = next(Path(LOADABLE).glob("libggml.*so"))
    found = [ctypes.CDLL(str(path)) for path in (Path(LOADABLE) / "libggml-base.so", ggml)]
    found[1].ggml_backend_load_all_from_path(LOADABLE.encode())
    return found


class Parameters(ctypes.Structure):
    _fields_ = [("bytes", c_size_t), ("memory", c_void_p), ("no_data", c_bool)]


def functions() -> dict[str, ctypes._NamedFuncPointer]:
    """The functions of ggml that are called here, by name without `ggml_`."""
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "init": (c_void_p, [Parameters]),
        "free": (None, [c_void_p]),
        "new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "view_3d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t]),
        "permute": (c_void_p, [c_void_p, c_void_p, c_int, c_int, c_int, c_int]),
        "mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
        "set_name": (c_void_p, [c_void_p, c_char_p]),
        "new_graph": (c_void_p, [c_void_p]),
        "build_forward_expand": (None, [c_void_p, c_void_p]),
        "nbytes": (c_size_t, [c_void_p]),
        "backend_dev_by_type": (c_void_p, [c_int]),
        "backend_dev_by_name": (c_void_p, [c_char_p]),
        "backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
        "backend_dev_backend_reg": (c_void_p, [c_void_p]),
        "backend_dev_buffer_type": (c_void_p, [c_void_p]),
        "backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
        "backend_buft_name": (c_char_p, [c_void_p]),
        "backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
        "backend_buffer_free": (None, [c_void_p]),
        "backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "backend_free": (None, [c_void_p]),
        "backend_cpu_buffer_type": (c_void_p, []),
    }
    found, loaded = {}, libraries()
    for name, (result, arguments) in signatures.items():
        for library in loaded:
            if hasattr(library, f"ggml_{name}"):
                found[name] = getattr(library, f"ggml_{name}")
                found[name].restype, found[name].argtypes = result, arguments
                break
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


class Machine:
    """The backend that computes our weights, and the buffer type that holds them."""

    def __init__(self, route: str) -> None:
        self.f = functions()
        cpu = self.f["backend_dev_by_type"](0)
        device = cpu if route == "a" else self.f["backend_dev_by_name"](b"LOSA")
        registry = self.f["backend_dev_backend_reg"](device)
        self.backend = self.f["backend_dev_init"](device, None)
        proc = self.f["backend_reg_get_proc_address"]
        set_threads = proc(registry, b"ggml_backend_set_n_threads")
        self.set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)(set_threads)
        self.resident = 0  # bytes that the last weight took when it was loaded
        self.buffers = self.f["backend_dev_buffer_type"](device)
        if route == "a":
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(
                proc(registry, b"ggml_backend_dev_get_extra_bufts")
            )
            self.buffers = extra(cpu)[0]
        assert self.f["backend_buft_name"](self.buffers) == b"LOSA"

    def run(
        self, weight: NDArray[np.uint8], x: NDArray[np.float32], spec: list[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """y [batch, tokens, rows], and the weight read back."""
        f, (kind, rows, threads, lie, chunks) = self.f, spec
        batch, tokens, columns = x.shape
        weights = f["init"](Parameters(1 << 16, None, True))
        w = f["new_tensor_2d"](weights, kind, columns, rows)
        f["set_name"](w, b"blk.0.ffn_up.weight")
        held = f["backend_alloc_ctx_tensors_from_buft"](weights, self.buffers)
        assert f["nbytes"](w) == weight.nbytes
        step, before = -(-weight.nbytes // chunks), resident()
        for at in range(0, weight.nbytes, step):
            part = weight[at : at + step]
            f["backend_tensor_set"](w, part.ctypes.data, at, part.nbytes)
        self.resident = resident() - before
        others = f["init"](Parameters(1 << 20, None, True))
        wide = columns + 5 if lie == 1 else columns
        shape = (columns, tokens) if lie != 2 else (tokens, columns)
        memory = f["new_tensor_3d"](others, 0, wide if lie != 2 else shape[0], shape[1], batch)
        seen = memory
        if lie == 1:
            seen = f["view_3d"](others, memory, columns, tokens, batch, 4 * wide, 4 * wide * tokens, 0)
        elif lie == 2:
            seen = f["permute"](others, memory, 1, 0, 2, 3)
        y = f["mul_mat"](others, w, seen)
        graph = f["new_graph"](others)
        f["build_forward_expand"](graph, y)
        plain = f["backend_alloc_ctx_tensors_from_buft"](others, f["backend_cpu_buffer_type"]())
        stored = np.zeros((batch, tokens, wide), np.float32)
        stored[:, :, :columns] = x
        stored = np.ascontiguousarray(x.transpose(0, 2, 1)) if lie == 2 else stored
        f["backend_tensor_set"](memory, stored.ctypes.data, 0, stored.nbytes)
        self.set_threads(self.backend, threads)
        assert f["backend_graph_compute"](self.backend, graph) == 0
        result = np.zeros((batch, tokens, rows), np.float32)
        f["backend_tensor_get"](y, result.ctypes.data, 0, result.nbytes)
        back = np.zeros_like(weight)
        f["backend_tensor_get"](w, back.ctypes.data, 0, back.nbytes)
        for buffer in (held, plain):
            f["backend_buffer_free"](buffer)
        for context in (weights, others):
            f["free"](context)
        return result, back


def main() -> None:
    plugin = load_plugin()
    if LOADABLE is None:
        importlib.import_module("llama_cpp")  # brings ggml into the process
        plugin.start()
    machine = Machine(os.environ["LOSA_GGML"])
    results: dict[str, NDArray[np.generic]] = {}
    notes = []
    with np.load(sys.argv[1]) as cases:
        for i in range(len(cases.files) // 3):
            spec = [int(n) for n in cases[f"spec_{i}"]]
            results[f"y_{i}"], results[f"w_{i}"] = machine.run(cases[f"w_{i}"], cases[f"x_{i}"], spec)
            note = {"damage": plugin.damage(), "statistics": asdict(plugin.statistics())}
            notes.append({**note, "resident": machine.resident})
    np.savez(sys.argv[2], **results)
    sys.stdout.write(json.dumps({"route": plugin.route, "notes": notes}) + "\n")


main()
