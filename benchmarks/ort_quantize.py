"""Linears of blocks in two bits, by ONNX Runtime's quantizer.

`python -m losa_deploy.benchmarks.ort_quantize SOURCE TARGET` writes the folder TARGET. In SOURCE they are
f32, and the head keeps the 4 bits it has there. They get 2, with a zero point and a scale per 32 weights.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import onnx

from .synthetic.graphs import DATA_FILE, MODEL_FILE
from .synthetic.linears import ACCURACY_LEVEL

BITS, BLOCK_SIZE = 2, 32
"""Weights per scale: as many as the builder takes for 4 bits."""
LOGITS, DENSE, QUANTIZED = "logits", "MatMul", "MatMulNBits"


def quantize(source: Path, target: Path) -> None:
    """The model in the folder `source`, quantized into the new folder `target`; other files are copied."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(MODEL_FILE, DATA_FILE))
    model = onnx.load(source / MODEL_FILE)
    done = [node.name for node in model.graph.node if node.op_type == QUANTIZED and LOGITS not in node.output]
    if done:
        raise SystemExit(f"{len(done)} linears of blocks have 4 bits, e.g. {done[0]}: expected f32")
    if any(node.op_type == DENSE and LOGITS in node.output for node in model.graph.node):
        raise SystemExit("the head is f32: expected 4 bits")
    quantizer = MatMulNBitsQuantizer(
        model, bits=BITS, block_size=BLOCK_SIZE, is_symmetric=False, accuracy_level=ACCURACY_LEVEL
    )
    quantizer.process()
    found = quantizer.model.model
    onnx.save(
        found,
        target / MODEL_FILE,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA_FILE,
    )


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))
