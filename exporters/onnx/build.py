"""Graph source for most families: onnxruntime-genai's builder, on a model without its large weights.

Run as `python -m losa_deploy.exporters.onnx.build MODEL_FOLDER OUTPUT_FOLDER`; writes `model.onnx`, its data
and a `genai_config.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
from onnxruntime_genai.models import builder

from losa_deploy.pretrained import load_config
from losa_deploy.sources.checkpoint import Checkpoint

from .stand_ins import HollowModel, hollow_model

OPTIONS = ["fuse_qkv=false"]
"""One MatMul per linear."""


def build(folder: Path, target: Path) -> None:
    """The f32 graph of the causal LM in `folder`, for CPUs."""
    _substitute(hollow_model(Checkpoint.open(folder), load_config(folder)))
    job = (str(folder), "", str(target), "fp32", "cpu", str(target / "cache"))
    builder.create_model(*job, **builder.parse_extra_options(*job, OPTIONS))


def _substitute(hollow: HollowModel) -> None:
    """Have the builder read and write models as we do.

    It takes the name of a model, loads all of it and writes every weight, in two methods of the class that
    all its models derive from.
    """

    def load(_: object, path: str) -> object:
        return hollow.model

    def save(self: builder.Model, folder: str) -> None:
        graph: ir.Model = self.model
        graph.graph.sort()
        hollow.save(graph, Path(folder))

    builder.Model.load_weights, builder.Model.save_model = load, save


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
