"""Where the dense f32 graph of a model comes from: one of two graph sources, run in a subprocess.

Both print, warn and draw progress bars as they like; in a process of their own all of that goes to
`export.log`, and their memory is given back before packing starts. Neither gets the large weights of the
model, see `stand_ins`; the graph says which tensors of the checkpoint they are.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray

from losa_deploy.attention import head_size, model_config
from losa_deploy.errors import InputError, MissingError, ResourceError
from losa_deploy.sources.checkpoint import Checkpoint

from .attention import TABLED, rope_kind, set_attention, write_plain_model
from .weights import Weight, weights_of

LOG_FILE = "export.log"
MODEL_FILE = "model.onnx"
SIGKILL = 9
CACHE_PORT = re.compile(r"(?:(?:in|out)put\.)?(?:past_key_values|cache)\.layers\.(\d+)\.(key|value)s")
"""What `transformers.exporters` calls the cache tensors; the prefix differs between its versions."""
HEAD_MULTIPLE = 16
"""Head sizes that the GroupQueryAttention kernel with rotary positions accepts are multiples of this."""


@dataclass(frozen=True)
class DenseGraph:
    """A graph without its external data, and the means to read single weights."""

    model: onnx.ModelProto
    folder: Path
    weights: Mapping[str, Weight] = field(default_factory=dict)
    """Initializers whose values are not in the folder but a checkpoint's."""

    def array(self, tensor: onnx.TensorProto) -> NDArray[np.generic]:
        """The value of an initializer; external data is mapped, not read."""
        if tensor.name in self.weights:
            return self.weights[tensor.name].array()
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset, shape = int(entries.get("offset", 0)), tuple(tensor.dims)
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.folder / entries["location"], dtype, "r", offset, shape)


@contextmanager
def dense_graph(checkpoint: Checkpoint, folder: Path, *, plain: bool = False) -> Iterator[DenseGraph]:
    """The graph of a checkpoint, valid inside the `with`; its files are beside `folder` and then removed.

    `plain` asks for standard operators only, which the genai builder does not have. Output of the source
    goes to `folder/export.log`. Raises `MissingError` if it is not installed, `InputError` if it fails.
    """
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.graph-") as name:
        work = Path(name)
        built = not plain and can_build(checkpoint)
        if built:
            write_plain_model(checkpoint, work / "plain")
            _require_builder()
            command = ["build", str(work / "plain"), str(work)]
        else:
            fusable = checkpoint.family.onnx_graph == "transformers"
            command = ["trace", str(checkpoint.folder), str(work)]
            command += ["plain"] if plain or not fusable else []
        _run(command, folder / LOG_FILE, work)
        model = onnx.load(work / MODEL_FILE, load_external_data=False)
        _rename_ports(model.graph)
        if built:
            set_attention(model.graph, checkpoint)
        yield DenseGraph(model, work, weights_of(model.graph.initializer, checkpoint))


def can_build(checkpoint: Checkpoint) -> bool:
    """Whether the builder knows the family, ONNX Runtime's fused attention the head size, and a table
    can hold the rotary positions.

    The builder takes every linear with as many outputs as there are tokens for the head.
    """
    config = model_config(checkpoint.config)
    fits = head_size(config) % HEAD_MULTIPLE == 0 and all(
        out != config.vocab_size for out, _ in checkpoint.linears.values()
    )
    return checkpoint.family.onnx_graph == "genai" and fits and rope_kind(checkpoint) in TABLED


def _require_builder() -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingError(
            "The ONNX export needs onnxruntime-genai, which is not installed.",
            hint="pip install onnxruntime-genai",
        )


def _run(command: list[str], log: Path, work: Path) -> None:
    """Run a module beside this one, offline, with everything it says appended to `log`."""
    module, *arguments = command
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(work),
    }
    with log.open("ab") as handle:
        done = subprocess.run(
            [sys.executable, "-m", f"losa_deploy.exporters.onnx.{module}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode == -SIGKILL:
        raise ResourceError(
            "The graph builder was killed, most likely because memory ran out.",
            hint="Close other programs or use a machine with more memory.",
        )
    if done.returncode != 0:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        raise InputError(f"The ONNX graph could not be built: {last}", hint=f"The whole output is in {log}.")


def _rename_ports(graph: onnx.GraphProto) -> None:
    """Inputs and outputs as runtimes expect them: `past_key_values.%d.key`, `present.%d.value`, …"""
    names: dict[str, str] = {}
    for prefix, values in (("past_key_values", graph.input), ("present", graph.output)):
        for value in values:
            match = CACHE_PORT.fullmatch(value.name)
            if match:
                names[value.name] = f"{prefix}.{match[1]}.{match[2]}"
                value.name = names[value.name]
    for node in graph.node:
        for ports in (node.input, node.output):
            for index, name in enumerate(ports):
                ports[index] = names.get(name, name)
    for value in (*graph.input, *graph.output):
        _name_dimensions(value)
    del graph.value_info[:]


def _name_dimensions(value: onnx.ValueInfoProto) -> None:
    """Readable symbols for the dynamic dimensions, equal in every run."""
    past = value.name.startswith("past_key_values")
    length = "past_sequence_length" if past else "total_sequence_length"
    if value.name in ("input_ids", "position_ids", "logits"):
        length = "sequence_length"
    axis = 2 if value.name.startswith(("past_key_values", "present")) else 1
    for index, dimension in enumerate(value.type.tensor_type.shape.dim):
        if dimension.HasField("dim_param") or not dimension.HasField("dim_value"):
            dimension.dim_param = {0: "batch_size", axis: length}.get(index, dimension.dim_param)
