"""Times one sparse f32 linear in DeepSparse and prints one JSON line.

Runs in an environment with deepsparse (Python 3.11 at most), not in ours: it imports nothing of
losa-deploy. By default the model is that single layer, where DeepSparse is at its best: 4096 x 11008
f32 values at 70 % are 54 MB, more than most caches hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from statistics import median

import numpy as np
import onnx
from onnx import helper, numpy_helper


def layers(shape: tuple[int, int], batch: int, sparsity: float, copies: int) -> bytes:
    """An ONNX model with outputs Yi[batch, rows] = X[batch, columns] @ Wi.T + bi, with random zeros.

    Gemms with a bias, as fully connected layers are exported: a plain MatMul runs several times slower.
    All in one model, because each compiled model has threads of its own, which would get into each
    other's way.
    """
    rows, columns = shape
    nodes, outputs, weights = [], [], []
    for index in range(copies):
        rng = np.random.default_rng(index)
        weight = rng.standard_normal((rows, columns), dtype=np.float32)
        weight[rng.random((rows, columns), dtype=np.float32) < sparsity] = 0
        names = [f"weight{index}", f"bias{index}"]
        bias = np.zeros(rows, np.float32)
        weights += [numpy_helper.from_array(a, name) for a, name in zip((weight, bias), names, strict=True)]
        nodes.append(helper.make_node("Gemm", ["x", *names], [f"y{index}"], transB=1))
        outputs.append(helper.make_tensor_value_info(f"y{index}", onnx.TensorProto.FLOAT, [batch, rows]))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, columns])
    graph = helper.make_graph(nodes, "layers", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Median over the passes; `weights_per_second` counts dense positions, once per token."""
    from deepsparse import compile_model

    shape, batch, copies = (options.rows, options.columns), options.batch, options.copies
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layers.onnx")
        with open(path, "wb") as file:
            file.write(layers(shape, batch, options.sparsity, copies))
        engine = compile_model(path, batch_size=batch, num_cores=options.threads)
    x = [np.random.default_rng(0).standard_normal((batch, shape[1]), dtype=np.float32)]
    engine.run(x)
    passes: list[float] = []
    begin = time.perf_counter()
    while len(passes) < 5 or time.perf_counter() - begin < options.seconds:
        start = time.perf_counter()
        engine.run(x)
        passes.append((time.perf_counter() - start) / copies)
    rates = [shape[0] * shape[1] * batch / seconds for seconds in passes]
    return {
        "name": "deepsparse",
        "version": metadata.version("deepsparse"),
        "value_type": "f32",
        "sparsity": options.sparsity,
        "threads": options.threads,
        "tokens": batch,
        "rows": shape[0],
        "columns": shape[1],
        "copies": copies,
        "weights_per_second": median(rates),
        "samples": rates,
    }


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1, help="layers with weights of their own")
    parser.add_argument("--seconds", type=float, default=2.0)
    sys.stdout.write(json.dumps(measure(parser.parse_args())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
