"""Blobs: exact round trips, and every kind of damage refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from losa_deploy.layouts import LAYOUTS, PackOptions, unpack
from losa_deploy.layouts.base import PackedTensor
from losa_deploy.layouts.blob import FIXED, HEADER_BYTES, blob_bytes, from_blob, read_header, to_blob

VALUE_TYPES: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")


def packed(layout: str, value_type: str, rows: int = 5, columns: int = 100) -> PackedTensor:
    rng = np.random.default_rng(rows * columns)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    mask = rng.random((rows, columns)) < 0.5
    options = PackOptions(value_type, 32, "f16" if columns % 2 else "f32")
    if layout == "nm":
        mask = np.tile(np.arange(columns) % 4 == 2, (rows, 1))
        options = replace(options, pattern=(1, 4))
    return LAYOUTS[layout].pack(weight, mask, options)


@pytest.mark.parametrize("value_type", VALUE_TYPES)
@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm"])
@pytest.mark.parametrize("shape", [(5, 100), (1, 1), (2, 63), (4, 256)])
def test_round_trip_is_exact(layout: str, value_type: str, shape: tuple[int, int]) -> None:
    if layout == "nm" and shape == (1, 1):
        pytest.skip("one column has no 1:4 pattern")
    before = packed(layout, value_type, *shape)
    assert (before.layout, before.value_type, before.shape) == (layout, value_type, shape)
    check_round_trip(before)


def pair(value_type: str, rows: int = 5, columns: int = 100) -> PackedTensor:
    """Rows that share a mask."""
    rng = np.random.default_rng(rows)
    mask = np.repeat(rng.random((-(-rows // 2), columns)) < 0.5, 2, axis=0)[:rows]
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    return LAYOUTS["bitmask"].pack(weight, mask, PackOptions(value_type, 32, rows_per_mask=2))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
@pytest.mark.parametrize("shape", [(5, 100), (2, 1), (2, 63), (4, 256)])
def test_round_trip_of_shared_masks_is_exact(value_type: str, shape: tuple[int, int]) -> None:
    before = pair(value_type, *shape)
    check_round_trip(before)
    mask, options = unpack(before).mask, PackOptions(value_type, 32, rows_per_mask=2)
    assert blob_bytes("bitmask", mask, options) == len(to_blob(before))


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (9, b"\x01", "type f16"),  # nothing says how many rows there are
        (11, b"\x00", "component positions has 48 bytes, 5 x 100 weights need 80"),
        (11, b"\x01", "1:0"),
        (11, b"\x03", "3:0"),
        (12, b"\x04", "2:4"),
        (16, struct.pack("<I", 4), "component positions has 48 bytes, 4 x 100 weights need 32"),
        (16, struct.pack("<I", 6), "component scale has 40 bytes, 6 x 100 weights need 48"),
        (128, b"\xff" * 12, "the mask needs"),
        (128 + 15, b"\x80", "outside of their row"),
    ],
)
def test_a_lie_about_shared_masks_is_refused(at: int, new: bytes, message: str) -> None:
    for value_type in ("i4", "i3"):
        blob = bytearray(to_blob(pair(value_type)))
        blob[at : at + len(new)] = new
        with pytest.raises(ValueError, match=message):
            from_blob(bytes(blob))


def check_round_trip(before: PackedTensor) -> None:
    after = from_blob(to_blob(before))
    assert (after.layout, after.value_type, after.shape) == (before.layout, before.value_type, before.shape)
    assert dict(after.params) == dict(before.params) and after.sha256 == before.sha256
    assert list(after.arrays) == list(before.arrays)
    assert all(after.arrays[name].dtype == array.dtype for name, array in before.arrays.items())
    assert after.nnz == before.nnz and to_blob(after) == to_blob(before)
    assert unpack(after).weight.tobytes() == unpack(before).weight.tobytes()


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm"])
def test_a_shortened_blob_is_refused(layout: str) -> None:
    blob = to_blob(packed(layout, "i4"))
    for length in (0, 4, 31, 127, 128, 200, len(blob) - 64):
        with pytest.raises(ValueError):
            from_blob(blob[:length])


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"LASO", "no packed tensor"),
        (4, b"\x02", "no packed tensor"),
        (8, b"\x05", "layout 5"),
        (9, b"\x05", "value type 5"),
        (9, b"\x04", "levels for codes that do not exist"),
        (10, b"\x00", "scale type 0"),
        (11, b"\x01", "1:0"),
        (14, b"\x07", "groups of 7"),
        (16, struct.pack("<I", 6), "bytes"),
        (20, struct.pack("<I", 200), "bytes"),
        (24, struct.pack("<Q", 501), "501 weights kept"),
        (FIXED.size, struct.pack("<Q", 129), "lies at 129"),
        (FIXED.size + 16, struct.pack("<Q", 128), "lies at 128"),
        (FIXED.size + 8, struct.pack("<Q", (1 << 64) - 64), "lies at"),
        (128, b"\xff" * 12, "the mask needs"),
        (128 + 15, b"\x80", "outside of their row"),
    ],
)
def test_a_lie_is_refused(at: int, new: bytes, message: str) -> None:
    blob = bytearray(to_blob(packed("bitmask", "i4")))
    blob[at : at + len(new)] = new
    with pytest.raises(ValueError, match=message):
        from_blob(bytes(blob))


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm", "tiled"])
@pytest.mark.parametrize("at", [16, 20])
def test_a_header_claims_no_more_than_its_components_hold(layout: str, at: int) -> None:
    """Whoever takes memory by the shape has read nothing but the header."""
    blob = bytearray(to_blob(tiles("i8") if layout == "tiled" else packed(layout, "i8")))
    assert read_header(bytes(blob[:HEADER_BYTES]), len(blob)).shape == struct.unpack_from("<II", blob, 16)
    blob[at : at + 4] = struct.pack("<I", 2**30)
    with pytest.raises(ValueError, match=r"component \w+ has \d+ bytes, .*1073741824.* weights need \d+"):
        read_header(bytes(blob[:HEADER_BYTES]), len(blob))


def tiles(value_type: str, n: int = 3, m: int = 16, columns: int = 64) -> PackedTensor:
    mask = np.tile((np.arange(columns) * 5 + 3) % m < n, (32, 1))
    weight = np.random.default_rng(n).standard_normal((32, columns)).astype(np.float32)
    return LAYOUTS["tiled"].pack(weight, mask, PackOptions(value_type, 32))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
@pytest.mark.parametrize(
    ("n", "m", "columns"), [(1, 16, 64), (3, 16, 64), (6, 16, 64), (15, 16, 64), (2, 4, 48), (1, 4, 48)]
)
def test_tiles_round_trip_is_exact(value_type: str, n: int, m: int, columns: int) -> None:
    if value_type == "i3" and m == 16:
        with pytest.raises(ValueError):
            tiles(value_type, n, m, columns)
        return
    before = tiles(value_type, n, m, columns)
    assert (before.params["n"], before.params["m"]) == (n, m)
    blob = to_blob(before)
    check_round_trip(before)
    assert blob_bytes("tiled", unpack(before).mask, PackOptions(value_type, 32)) == len(blob)
    for length in (127, 128, 200, len(blob) - 64):
        with pytest.raises(ValueError):
            from_blob(blob[:length])


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (9, b"\x00", "type f32"),
        (11, b"\x10", "16:16"),
        (12, b"\x08", "3:8"),
        (13, b"\x04", "4 position bits"),
        (16, struct.pack("<I", 31), "31 x 64"),
        (20, struct.pack("<I", 56), "32 x 56"),
        (24, struct.pack("<Q", 7), "as many"),
        (128, b"\x0f", "ascend"),
        (128 + 33, b"\x10", "ascend"),  # a free slot with a value
        (128 + 33, b"\x01", "ascend"),  # ... or with a position
    ],
)
def test_a_lie_about_tiles_is_refused(at: int, new: bytes, message: str) -> None:
    blob = bytearray(to_blob(tiles("i4")))
    blob[at : at + len(new)] = new
    with pytest.raises(ValueError, match=message):
        from_blob(bytes(blob))


@pytest.mark.parametrize(
    ("n", "at", "new", "message"),
    [
        (2, 11, b"\x03", "3:4"),
        (2, 12, b"\x10", "bytes"),
        (2, 24, struct.pack("<Q", 7), "as many"),
        (2, 128, b"\x00", "ascend"),  # both slots of a row at position 0
        (1, 128 + 32, b"\x10", "ascend"),  # beyond the steps of 48 columns
    ],
)
def test_a_lie_about_quads_is_refused(n: int, at: int, new: bytes, message: str) -> None:
    blob = bytearray(to_blob(tiles("i4", n, 4, 48)))
    blob[at : at + len(new)] = new
    if at == 128:
        blob[at + 1] = 0
    with pytest.raises(ValueError, match=message):
        from_blob(bytes(blob))


def test_positions_of_n_of_m_are_checked() -> None:
    blob = bytearray(to_blob(packed("nm", "i8")))  # 1:4 as codes of 2 bits
    blob[128 + 30] ^= 0x40  # beyond the 25 groups of a row
    with pytest.raises(ValueError, match="outside of their row"):
        from_blob(bytes(blob))
    mask = np.tile(np.arange(96) % 12 < 5, (3, 1))
    five = LAYOUTS["nm"].pack(np.ones((3, 96), np.float32), mask, PackOptions("i8", pattern=(5, 12)))
    lying = bytearray(to_blob(five))
    lying[128] ^= 1
    with pytest.raises(ValueError, match="as many as their group"):
        from_blob(bytes(lying))
