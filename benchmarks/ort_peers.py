"""ONNX Runtime's own quantizations of a real model, as peers: in ONNX Runtime, with nothing of ours.

`ort-int4` is what onnxruntime-genai's builder writes with `-p int4`, all defaults. It knows no two bits: for
`ort-int2` it leaves the linears of blocks as they are, and `ort_quantize.py` gives these to ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from losa_deploy.errors import LosaError, MissingError
from losa_deploy.output import remove, require_disk
from losa_deploy.plugins import load_runtime

from .peer_kinds import Material
from .synthetic.geometry import model_bytes
from .synthetic.linears import OrtInt2, OrtInt4
from .synthetic.peers import Contender

RUNTIME = "ort-stock"
BUILDER = "onnxruntime_genai.models.builder"
QUANTIZER = "losa_deploy.benchmarks.ort_quantize"
TWO_BITS = OrtInt2.name
LINEARS = tuple(f"attn/{name}_proj" for name in ("qkv", "q", "k", "v", "o")) + tuple(
    f"mlp/{name}" for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
)
"""Names that the builder gives linears of blocks; no graph has all of them."""
DISK = {OrtInt4.name: 1.5, TWO_BITS: 4.0}
"""Bytes that a peer needs while it is made, by those of the dense F16 file."""


class OrtPeers:
    """Peers that ONNX Runtime's own tools make."""

    names = tuple(DISK)

    def make(self, name: str, material: Material) -> Contender:
        """The folder of the peer, made of the Hugging Face folder."""
        target = material.folder / f"{material.dense.stem}-{name}"
        if not target.is_dir():
            _build(name, target, material)
        return Contender(name, target, model_bytes(target), load_runtime(RUNTIME))


def _build(name: str, target: Path, material: Material) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingError(
            "It is made by onnxruntime-genai, which is not installed.",
            hint="Run `pip install onnxruntime-genai`.",
        )
    needed = int(DISK[name] * material.dense.stat().st_size)
    require_disk(material.folder, needed, f"The peer {name}")
    unfinished = target.with_name(f"{target.name}.partial")
    remove(unfinished)
    try:
        built, source = unfinished / "built", material.source()
        command = [BUILDER, "-m", str(source.folder), "-o", str(built), "-c", str(unfinished / "cache")]
        command += ["-p", "int4", "-e", "cpu"]
        material.progress(0, 1, f"building {name}")
        if name == TWO_BITS:
            nodes = [
                f"/model/layers.{i}/{part}/MatMul" for i in range(source.block_count) for part in LINEARS
            ]
            _run([*command, "--extra_options", f"nodes_to_exclude={','.join(nodes)}"])
            built, dense = unfinished / "quantized", built
            _run([QUANTIZER, str(dense), str(built)])
        else:
            _run(command)
        built.rename(target)
    finally:
        remove(unfinished)


def _run(command: Sequence[str]) -> None:
    """Run a module, offline and quiet; `LosaError` with its last line if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        raise LosaError(f"{command[0]} was killed, most likely because memory ran out.", hint="Leave it out.")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        raise LosaError(f"{command[0]} cannot make it of this model: {lines[-1]}", hint="Leave it out.")
