"""Synthetic GGUF models: what is in the files, and that llama.cpp opens the dense ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.benchmarks.synthetic.peers import Contender, build_contenders
from losa_deploy.benchmarks.synthetic.tensors import RandomWeight, Storage
from losa_deploy.errors import InputError, LosaError
from losa_deploy.layouts.blob import to_blob
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime

TINY = GEOMETRIES["tiny"]
STORAGE = Storage("bitmask", "i4", 0.6)


def test_ours_holds_blobs_and_is_refused_by_llama_cpp(tmp_path: Path) -> None:
    import llama_cpp

    size = ggufs.build_ours(TINY, STORAGE, tmp_path / "ours", seed=3)
    path = tmp_path / "ours" / "model.gguf"
    assert path.stat().st_size == size
    reader = GGUFReader(path)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None and architecture.contents() == "losa-packed"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    blob = to_blob(RandomWeight((128, 128), 0.6, seed=3 + 2).pack(STORAGE))
    stored = tensors["losa.blk.0.attn_q.weight"]
    assert stored.data.tobytes() == blob and stored.data_offset % 64 == 0
    assert "blk.0.attn_q.weight" not in tensors and "blk.1.attn_norm.weight" in tensors
    head = tensors["output.weight"]
    assert head.tensor_type.name == "Q8_0"
    blocks = head.data.reshape(TINY.vocab, TINY.hidden // 32, 34)
    assert (blocks[:, :, :2] == blocks[:, :1, :2]).all()  # one scale per row
    scale = blocks[:, 0, :2].copy().view(np.float16).astype(np.float32)
    levels = blocks[:, :, 2:].copy().view(np.int8).reshape(TINY.vocab, TINY.hidden)
    weight = RandomWeight((TINY.vocab, TINY.hidden), 0.0, seed=3 + 1).matrix()
    assert np.abs(scale * levels - weight).max() <= 0.51 * scale.max()
    with pytest.raises(ValueError, match="Failed to load"):
        llama_cpp.Llama(str(path), verbose=False)


@pytest.mark.parametrize(("value_type", "bits", "agreement"), [("i4", 4.2, 0.85), ("i3", 3.2, 0.65)])
def test_our_dense_peers_are_blobs_that_compute_the_dense_model(
    value_type: str, bits: float, agreement: float, tmp_path: Path
) -> None:
    storage, runtime = Storage("tiled", "i3", 0.5, (2, 4)), LlamaCppRuntime()
    peers = [f"ours-dense-{value_type}", "f16"]
    ours, peer, f16 = build_contenders(TINY, storage, peers, tmp_path, runtime)
    assert (peer.name, peer.runtime) == (peers[0], runtime)
    blobs = [t for t in GGUFReader(peer.folder / "model.gguf").tensors if t.name.startswith("losa.blk.")]
    assert len(blobs) == 7 * TINY.blocks
    stored = sum(blob.n_bytes for blob in blobs)
    assert stored * 8 < bits * TINY.block_weights and ours.bytes < peer.bytes
    found = [_logits(contender) for contender in (peer, f16)]
    assert np.corrcoef(*found)[0, 1] > agreement


def _logits(contender: Contender) -> NDArray[np.float32]:
    session = contender.runtime.open(contender.folder, threads=1)
    found = session.logits(range(3, 40))
    session.close()
    return found.ravel()


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q3_k_s", "iq3_xxs", "iq2_m"])
def test_peers_are_quantized_by_llama_cpp_and_reused(name: str, tmp_path: Path) -> None:
    import llama_cpp

    place = tmp_path / f"tiny-{name}"
    size = ggufs.build_peer(TINY, name, place, seed=0, threads=1)
    assert size < (tmp_path / "tiny-f16" / "model.gguf").stat().st_size / 2
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(place / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] in ("Q4_0", "Q5_0", "IQ4_NL")  # 128 columns are too few for K-quants
    model = llama_cpp.Llama(str(place / "model.gguf"), n_ctx=32, verbose=False, logits_all=True)
    model.eval([1, 2, 3])
    assert np.isfinite(model.scores[:3]).all() and np.abs(model.scores[:3]).max() > 0
    model.close()
    assert sorted(path.name for path in place.iterdir()) == ["bench.json", "model.gguf"]
    before = (place / "model.gguf").stat().st_mtime_ns
    assert ggufs.build_peer(TINY, name, place, seed=0, threads=1) == size
    assert (place / "model.gguf").stat().st_mtime_ns == before


def test_errors_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(LosaError, match="could not quantize"):
        ggufs.quantize(tmp_path / "none.gguf", "q4_0", 1, tmp_path / "out.gguf")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match="no model of a benchmark"):
        ggufs.build_ours(TINY, STORAGE, other, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
