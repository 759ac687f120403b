"""What a dense weight takes in a format, beside which a report puts the pruned one."""

from __future__ import annotations

import pytest

from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.exporters.onnx.exporter import OnnxExporter

SCALES = 2 * 64 + 16


@pytest.mark.parametrize(
    ("value_type", "gguf", "onnx"),
    [
        ("f16", 64 * 128 * 2, 64 * 128 * 2),
        ("i8", 64 * 4 * 34, 64 * 128 + 4 * 64),  # Q8_0; a scale per row
        ("i4", 64 * 4 * 18, 64 * 64 + SCALES),  # Q4_0; groups of 128 and a table
        ("i3", 64 * 48 + SCALES, 64 * 48 + SCALES),  # llama.cpp has no type as small
    ],
)
def test_dense_bytes(value_type: str, gguf: int, onnx: int) -> None:
    assert GgufExporter().dense_bytes((64, 128), value_type, 128) == gguf
    assert OnnxExporter().dense_bytes((64, 128), value_type, 128) == onnx
