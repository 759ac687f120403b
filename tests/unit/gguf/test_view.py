"""The standard view of a packed GGUF, its expansion, and files that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.decoder import Geometry
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.benchmarks.synthetic.tensors import RandomWeight, Storage
from losa_deploy.errors import InputError
from losa_deploy.gguf import view as gguf_view
from losa_deploy.gguf.types import F16, F32, Q4_0
from losa_deploy.layouts import unpack
from losa_deploy.layouts.blob import HEADER_BYTES

TINY = GEOMETRIES["tiny"]
STORAGES = {
    "i8": Storage("bitmask", "i8", 0.6),
    "i4": Storage("bitmask", "i4", 0.6),
    "f16": Storage("nm", "f16", 0.5, (2, 4)),
    "f32": Storage("bitmask", "f32", 0.6),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    ggufs.build_ours(TINY, STORAGES["i4"], folder / "ours", seed=3)
    return folder / "ours" / "model.gguf"


def materialized(path: Path, target: Path) -> Path:
    """The view as a file."""
    view, data = gguf_view.standard_view(path), path.read_bytes()
    content = bytearray(view.total_bytes)
    content[: len(view.header)] = view.header
    end = len(view.header)
    for piece in view.pieces:
        assert piece.at >= end
        start = data[piece.offset : piece.offset + piece.bytes]
        shown = start[:HEADER_BYTES] if start.startswith(b"LOSA") else start
        end = piece.at + len(shown)
        content[piece.at : end] = shown
    assert end <= view.total_bytes
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("name", list(STORAGES))
def test_view_is_a_standard_file_whose_tensors_start_with_the_headers(name: str, tmp_path: Path) -> None:
    ggufs.build_ours(TINY, STORAGES[name], tmp_path / "ours", seed=3)
    path = tmp_path / "ours" / "model.gguf"
    assert gguf_view.is_packed(path)
    shown = GGUFReader(materialized(path, tmp_path / "view.gguf"))
    architecture = shown.get_field("general.architecture")
    assert architecture is not None and architecture.contents() == "llama"
    blobs = {t.name: t for t in GGUFReader(path).tensors}
    standard = {t.name: t for t in shown.tensors}
    assert not any(tensor.startswith("losa.") for tensor in standard)
    assert len(standard) == len(blobs)
    query = standard["blk.1.ffn_down.weight"]
    assert (query.tensor_type, tuple(query.shape)) == (GGMLQuantizationType.Q1_0, (256, 128))
    blob = blobs["losa.blk.1.ffn_down.weight"].data.tobytes()
    data = query.data.tobytes()
    assert data.startswith(blob[:HEADER_BYTES]) and not any(data[HEADER_BYTES:])
    assert standard["output.weight"].data.tobytes() == blobs["output.weight"].data.tobytes()


@pytest.mark.parametrize("name", list(STORAGES))
def test_expanded_holds_what_the_bytes_mean_and_opens_in_llama_cpp(name: str, tmp_path: Path) -> None:
    import llama_cpp

    storage = STORAGES[name]
    ggufs.build_ours(TINY, storage, tmp_path / "ours", seed=3)
    target = tmp_path / "plain.gguf"
    gguf_view.write_expanded(tmp_path / "ours" / "model.gguf", target)
    assert not gguf_view.is_packed(target)
    tensors = {t.name: t for t in GGUFReader(target).tensors}
    assert {t.tensor_type for t in tensors.values()} == {GGMLQuantizationType.F32}
    weight = unpack(RandomWeight((128, 128), 0.6, storage.pattern, seed=3 + 2).pack(storage)).weight
    assert tensors["blk.0.attn_q.weight"].data.tobytes() == weight.tobytes()
    model = llama_cpp.Llama(str(target), n_ctx=32, verbose=False, logits_all=True)
    model.eval([1, 2, 3])
    assert np.isfinite(model.scores[:3]).all()
    model.close()


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "f16"])
def test_a_dense_file_expands_as_gguf_itself_decodes_it(kind: str, tmp_path: Path) -> None:
    from gguf.quants import dequantize

    ggufs.build_peer(TINY, kind, tmp_path / f"tiny-{kind}", seed=0, threads=1)
    source = tmp_path / f"tiny-{kind}" / "model.gguf"
    assert not gguf_view.is_packed(source)
    gguf_view.write_expanded(source, tmp_path / "plain.gguf")
    expected = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    for tensor in GGUFReader(tmp_path / "plain.gguf").tensors:
        stored = expected[tensor.name]
        decoded = dequantize(stored.data, stored.tensor_type)
        assert np.array_equal(tensor.data.reshape(-1), decoded.reshape(-1))


def test_types_that_we_do_not_write_are_refused(tmp_path: Path) -> None:
    ggufs.build_peer(TINY, "q4_k_m", tmp_path / "tiny-q4_k_m", seed=0, threads=1)
    with pytest.raises(InputError, match="type 6, expected one of F32"):
        gguf_view.write_expanded(tmp_path / "tiny-q4_k_m" / "model.gguf", tmp_path / "plain.gguf")


def test_a_view_declares_the_fewest_bytes_that_hold_a_header() -> None:
    assert gguf_view.declared((64, 256)) == (gguf_view.Q1_0, 64 * 2 * 18)
    assert gguf_view.declared((64, 96)) == (Q4_0, 64 * 3 * 18)
    assert gguf_view.declared((64, 72)) == (F16, 64 * 72 * 2)  # 72 columns are no whole blocks
    assert gguf_view.declared((7, 128)) == (Q4_0, 7 * 4 * 18)  # 126 bytes of Q1_0 are too few
    assert gguf_view.declared((4, 12)) == (F32, 192)
    assert gguf_view.declared((3, 10)) is None


def patched(path: Path, target: Path, at: int, new: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    target.write_bytes(data)
    return target


def test_a_shortened_file_is_refused_wherever_it_ends(packed: Path, tmp_path: Path) -> None:
    data, short = packed.read_bytes(), tmp_path / "short.gguf"
    for length in (0, 3, 4, 23, 40, 200, 900, len(data) // 2, len(data) - 1):
        short.write_bytes(data[:length])
        with pytest.raises(InputError, match="no sound GGUF"):
            gguf_view.standard_view(short)
        with pytest.raises(InputError, match="no sound GGUF"):
            gguf_view.write_expanded(short, tmp_path / "out.gguf")


def test_lies_are_refused(packed: Path, tmp_path: Path) -> None:
    data, bad = packed.read_bytes(), tmp_path / "bad.gguf"
    name = b"losa.blk.0.attn_q.weight"
    info = data.index(name) + len(name)  # dimensions, size, type, offset
    blob = GGUFReader(packed)
    place = next(int(t.data_offset) for t in blob.tensors if t.name == name.decode())
    format_at = data.index(b"losa.format") + len(b"losa.format") + 4
    cases: list[tuple[int, bytes, str]] = [
        (0, b"GGML", "starts with"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 1 << 60), "claims"),
        (16, struct.pack("<Q", 1 << 60), "claims"),
        (24, struct.pack("<Q", 1 << 63), "inside of its header"),
        (format_at, struct.pack("<I", 2), "losa.format is 2"),
        (data.index(b"losa-packed"), b"losa-puzzle", "architecture"),
        (info, struct.pack("<I", 7), "7 dimensions"),
        (info + 4, struct.pack("<Q", 1 << 40), "should lie at"),
        (info + 12, struct.pack("<I", 99), "type 99"),
        (info + 16, struct.pack("<Q", 1 << 62), "should lie at"),
        (info + 16, struct.pack("<Q", 1), "should lie at"),
        (place, b"LASO", "no packed tensor"),
        (place + 8, b"\x09", "layout 9"),
        (place + 16, struct.pack("<I", 0), "0 x 128"),
        (place + 32, struct.pack("<Q", 1 << 63), "lies at"),
        (place + 40, struct.pack("<Q", 1 << 63), "lies at"),
    ]
    for at, new, message in cases:
        with pytest.raises(InputError, match=message):
            gguf_view.standard_view(patched(packed, bad, at, new))


def test_positions_that_lie_are_found_when_the_bytes_are_read(packed: Path, tmp_path: Path) -> None:
    place = next(
        int(t.data_offset) for t in GGUFReader(packed).tensors if t.name == "losa.blk.0.attn_q.weight"
    )
    bad = patched(packed, tmp_path / "bad.gguf", place + 128, b"\xff" * 64)
    gguf_view.standard_view(bad)  # only headers are looked at
    with pytest.raises(InputError, match="the mask needs"):
        gguf_view.write_expanded(bad, tmp_path / "out.gguf")


def test_columns_that_are_no_whole_blocks_are_shown_as_f16(tmp_path: Path) -> None:
    odd = Geometry("odd", 96, 200, 1, 4, 2, 64)
    ggufs.build_ours(odd, Storage("bitmask", "i8", 0.6), tmp_path / "ours", seed=0)
    shown = GGUFReader(materialized(tmp_path / "ours" / "model.gguf", tmp_path / "view.gguf"))
    types = {t.name: t.tensor_type.name for t in shown.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q4_0"
