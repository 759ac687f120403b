"""Synthetic models for llama.cpp: ours as a packed GGUF, its peers as llama.cpp's own quantizer makes them.

The peers are what people run: one random dense F16 model, quantized to each type with llama.cpp's own
mixture of types per tensor. Every tensor has values of its own; only the rows of one repeat.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, LosaError
from losa_deploy.gguf.names import EMBEDDING, FINAL_NORM, HEAD, PARTS, PREFIX, block_tensor
from losa_deploy.gguf.packed import mark_packed
from losa_deploy.gguf.types import I8, Q8_0, GgmlType
from losa_deploy.layouts.blob import to_blob
from losa_deploy.output import require_disk
from losa_deploy.progress import Progress, no_progress

from ..ik import package as ik_package
from ..ik.package import IkPackage
from .decoder import CONTEXT, EPSILON, THETA, Geometry
from .tensors import Pruning, RandomWeight, Storage

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

SPEC_FILE = "bench.json"
BUILDER = 2
"""Raise when the files change, so that kept models are written anew."""
SOURCE = "f16"
PEERS: Mapping[str, float] = {
    "q4_0": 4.55,
    "q4_k_m": 4.9,
    "q8_0": 8.55,
    "q3_k_m": 4.0,
    "q3_k_s": 3.7,
    "q2_k": 3.4,
    SOURCE: 16.0,
}
"""Name of each type → bits per weight, rounded up, for the estimate of the disk it needs."""
WITH_IMPORTANCE: Mapping[str, float] = {"iq3_xxs": 3.4, "iq2_m": 3.0}
"""The same of peers that are only measured by name: slow to make, and of importances of the inputs."""
FLOATS = ("f32", "f16")
Make = Callable[[Path], None]


def build_ours(
    geometry: Geometry, storage: Storage, folder: Path, seed: int, progress: Progress = no_progress
) -> int:
    """Our packed model in `folder/model.gguf`, or what is there already; returns its bytes.

    Dense integers are packed too, as `export --packed --layout dense` does it; dense floats are F16 tensors.
    """
    pruning = storage.pruning(seed)
    spec = {"storage": storage.label, "group_size": storage.group_size, **_spec(geometry, seed)}
    bits = 1.05 * 32 if storage.value_type == "f32" else 1.05 * 16
    return _build(
        folder, spec, _estimate(geometry, bits), partial(_write_ours, geometry, storage, pruning, progress)
    )


def build_peer(
    geometry: Geometry, name: str, folder: Path, seed: int, threads: int, progress: Progress = no_progress
) -> int:
    """The dense peer of `PEERS` or `WITH_IMPORTANCE` in `folder/model.gguf`.

    The F16 model that it is made of stays beside it. All inputs of random weights are equally important.
    """
    spec = {"type": name, **_spec(geometry, seed)}
    size = _estimate(geometry, {**PEERS, **WITH_IMPORTANCE}[name])
    if name == SOURCE:
        return _build(folder, spec, size, partial(_write_dense, geometry, seed, progress))
    source = _source(geometry, folder, spec, seed, progress)
    progress(0, 1, f"quantizing to {name}")
    if name in WITH_IMPORTANCE:
        return _build(folder, spec, size, partial(_quantize_evenly, geometry, source, name, threads))
    return _build(folder, spec, size, partial(quantize, source, name, threads))


def _quantize_evenly(geometry: Geometry, source: Path, name: str, threads: int, target: Path) -> None:
    """With the importance 1 for every input of every block linear."""
    from safetensors.numpy import save_file

    weights = {
        f"{block_tensor(block, PARTS[linear])}": np.ones(shape[1], np.float32)
        for block in range(geometry.blocks)
        for linear, shape in geometry.linears.items()
    }
    importance = target.with_suffix(".importance")
    save_file(weights, importance)
    quantize(source, name, threads, target, importance)
    importance.unlink()


def build_ik_peer(
    geometry: Geometry,
    name: str,
    folder: Path,
    seed: int,
    threads: int,
    package: IkPackage,
    progress: Progress = no_progress,
) -> int:
    """The same of `ik.package.PEERS`, as the quantizer of ik_llama.cpp makes it."""
    spec = {"type": name, "ik": package.version, **_spec(geometry, seed)}
    source = _source(geometry, folder, spec, seed, progress)
    progress(0, 1, f"quantizing to {name}")
    size = _estimate(geometry, ik_package.PEERS[name])
    return _build(folder, spec, size, lambda path: ik_package.quantize(package, source, path, name, threads))


def _source(
    geometry: Geometry, folder: Path, spec: Mapping[str, object], seed: int, progress: Progress
) -> Path:
    """The F16 model beside `folder` that a peer is made of; it is made too, unless the peer is there."""
    source = folder.with_name(f"{geometry.name}-{SOURCE}")
    if not _is_built(folder, spec):
        build_peer(geometry, SOURCE, source, seed, 1, progress)
    return source / "model.gguf"


def quantize(source: Path, kind: str, threads: int, target: Path, importance: Path | None = None) -> None:
    """Quantize a GGUF file with llama.cpp, in a process of its own: it prints as it likes.

    `importance` is a file of `imatrix.importance_file`, which types below 3.5 bits need.
    """
    command = [sys.executable, "-m", "losa_deploy.benchmarks.synthetic.quantize"]
    command += [str(source), str(target), kind, str(threads)]
    command += [str(importance)] if importance else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LosaError(
            f"llama.cpp could not quantize {source} to {kind}: {last}",
            hint="Leave it out of the measurement.",
        )


def _spec(geometry: Geometry, seed: int) -> dict[str, object]:
    return {"geometry": asdict(geometry), "seed": seed, "builder": BUILDER}


def _estimate(geometry: Geometry, bits: float) -> int:
    tables = geometry.vocab * geometry.hidden * (1 if geometry.tied else 2)
    return int((geometry.block_weights + tables) * bits / 8 * 1.02) + (1 << 20)


def _is_built(folder: Path, spec: Mapping[str, object]) -> bool:
    path = folder / SPEC_FILE
    return path.is_file() and json.loads(path.read_text("utf-8")) == spec


def _build(folder: Path, spec: Mapping[str, object], estimate: int, make: Make) -> int:
    """Make `folder/model.gguf` unless it is there; `ResourceError` if the disk is too small."""
    model = folder / "model.gguf"
    if not _is_built(folder, spec):
        if folder.exists() and not (folder / SPEC_FILE).is_file():
            raise InputError(f"{folder} is no model of a benchmark.", hint="Give another folder to --keep.")
        require_disk(folder.parent, estimate, f"The model {folder.name}")
        unfinished = folder.with_name(folder.name + ".partial")
        for old in (folder, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            make(unfinished / "model.gguf")
            (unfinished / SPEC_FILE).write_text(json.dumps(spec, indent=1), "utf-8")
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return model.stat().st_size


def _write_ours(
    geometry: Geometry, storage: Storage, pruning: Pruning, progress: Progress, path: Path
) -> None:
    """A packed file as docs/formats.md describes it; embedding and head are Q8_0."""
    writer = _writer(geometry, path)
    mark_packed(writer)
    for name, weight in _tables(geometry, pruning.seed):
        writer.add_tensor(name, _q8_0(weight), raw_dtype=_type(Q8_0))
    for name, weight in _linears(geometry, pruning, progress, "ours"):
        if storage.layout == "dense" and storage.value_type in FLOATS:
            writer.add_tensor(name, weight.matrix().astype(np.float16))
        else:
            blob = np.frombuffer(to_blob(weight.pack(storage)), np.int8)
            writer.add_tensor(f"{PREFIX}{name}", blob, raw_dtype=_type(I8))
    _finish(geometry, writer)


def _write_dense(geometry: Geometry, seed: int, progress: Progress, path: Path) -> None:
    """Random F16 weights, none of them zero."""
    writer = _writer(geometry, path)
    for name, weight in (
        *_tables(geometry, seed),
        *_linears(geometry, Pruning(0.0, seed=seed), progress, SOURCE),
    ):
        writer.add_tensor(name, np.tile(weight.rows[0].astype(np.float16), (weight.repeats, 1)))
    _finish(geometry, writer)


def _writer(geometry: Geometry, path: Path) -> GGUFWriter:
    """A GGUF of the Llama shape without a tokenizer; tensors wait in a temporary file."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(geometry.hidden)
    writer.add_block_count(geometry.blocks)
    writer.add_feed_forward_length(geometry.intermediate)
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_vocab_size(geometry.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    return writer


def _finish(geometry: Geometry, writer: GGUFWriter) -> None:
    """Norms of one, and everything to the disk."""
    ones = np.ones(geometry.hidden, np.float32)
    for block in range(geometry.blocks):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add_tensor(block_tensor(block, PARTS[norm]), ones)
    writer.add_tensor(FINAL_NORM, ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tables(geometry: Geometry, seed: int) -> Iterator[tuple[str, RandomWeight]]:
    shape = (geometry.vocab, geometry.hidden)
    yield EMBEDDING, RandomWeight(shape, 0.0, seed=seed)
    if not geometry.tied:
        yield HEAD, RandomWeight(shape, 0.0, seed=seed + 1)


def _linears(
    geometry: Geometry, pruning: Pruning, progress: Progress, label: str
) -> Iterator[tuple[str, RandomWeight]]:
    seed = pruning.seed + 2
    for block in range(geometry.blocks):
        progress(block, geometry.blocks, f"writing {label}")
        for linear, shape in geometry.linears.items():
            name = block_tensor(block, PARTS[linear])
            yield name, pruning.weight(shape, seed)
            seed += 1
    progress(geometry.blocks, geometry.blocks, f"writing {label}")


def _q8_0(weight: RandomWeight) -> NDArray[np.uint8]:
    """Blocks [out, bytes] of a dense weight with one scale per row: our i8 in llama.cpp's type."""
    packed = weight.pack(Storage("dense", "i8"))
    return Q8_0.encode(packed.arrays["values"], packed.arrays["scale"].astype(np.float16)[:, None])


def _type(kind: GgmlType) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind.id)
