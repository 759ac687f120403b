"""Literal bytes of small packed tensors, written out by hand from docs/formats.md."""

from __future__ import annotations

import hashlib

import numpy as np

from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.base import PackedTensor


def pack(layout: str, weight: list[list[float]], mask: list[list[int]], options: PackOptions) -> PackedTensor:
    return LAYOUTS[layout].pack(np.array(weight, np.float32), np.array(mask, np.bool_), options)


def stored(packed: PackedTensor) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in packed.arrays.items()}


def test_bitmask_i8() -> None:
    packed = pack("bitmask", [[1.0, 9.0, -0.5], [9.0, 2.0, 0.0]], [[1, 0, 1], [0, 1, 1]], PackOptions("i8"))
    assert stored(packed) == {
        "positions": bytes([0b101, 0, 0, 0, 0, 0, 0, 0, 0b110, 0, 0, 0, 0, 0, 0, 0]),
        # -0.5 / (1/127) = -63.5 rounds to the even level -64; the kept zero keeps its slot.
        "values": bytes([127, 256 - 64, 127, 0]),
        "scale": np.array([1 / 127, 2 / 127], "<f4").tobytes(),
    }
    assert packed.nnz == 4
    assert packed.sha256 == hashlib.sha256(b"".join(stored(packed).values())).hexdigest()


def test_bitmask_f32_and_f16() -> None:
    weight, mask = [[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0]], [[1, 0, 0, 0, 0, 0, 0, 0, 1]]
    for value_type, values in (("f32", "0000803f000000c0"), ("f16", "003c00c0")):
        packed = pack("bitmask", weight, mask, PackOptions(value_type))  # type: ignore[arg-type]
        assert stored(packed) == {
            "positions": bytes([1, 1, 0, 0, 0, 0, 0, 0]),
            "values": bytes.fromhex(values),
        }


def test_bitmask_i4_signed_scale_low_nibble_first_and_odd_count() -> None:
    packed = pack("bitmask", [[4.0, 0.0, -3.0, 1.0]], [[1, 0, 1, 1]], PackOptions("i4", group_size=32))
    assert stored(packed) == {
        "positions": bytes([0b1101, 0, 0, 0, 0, 0, 0, 0]),
        # scale 4 / -8 = -0.5, levels -8, 6, -2, codes 0, 14, 6, completed with code 8.
        "values": bytes([0xE0, 0x86]),
        "scale": bytes.fromhex("00b8"),
        "table": bytes(range(0xF8, 0x100)) + bytes(range(8)),
    }


def test_dense_i4_starts_every_row_at_a_byte() -> None:
    packed = pack("dense", [[8.0, 0.0, 1.0], [-8.0, -1.0, 0.0]], [[1] * 3] * 2, PackOptions("i4", 32))
    # Row 0: scale -1, levels -8, 0, -1; row 1: scale 1, levels -8, -1, 0.
    assert stored(packed)["values"] == bytes([0x80, 0x87, 0x70, 0x88])
    assert stored(packed)["scale"] == bytes.fromhex("00bc003c")


def test_nm_2_of_4_stores_mask_bits() -> None:
    mask = [[1, 0, 0, 1, 0, 1, 1, 0]]
    packed = pack("nm", [[1.0] * 8], mask, PackOptions("f16", pattern=(2, 4)))
    assert stored(packed) == {"positions": bytes([0b01101001]), "values": bytes.fromhex("003c" * 4)}
    assert packed.params["position_bits"] == 0


def test_nm_1_of_4_stores_two_bit_codes() -> None:
    mask = [[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]]
    packed = pack("nm", [[2.0] * 12], mask, PackOptions("f16", pattern=(1, 4)))
    assert stored(packed) == {"positions": bytes([0b110010]), "values": bytes.fromhex("0040" * 3)}
    assert packed.params["position_bits"] == 2


def test_nm_short_last_group_points_beyond_the_row() -> None:
    """1:4 with 5 columns, the last one pruned: the free slot is position 1 of the group (column 5)."""
    packed = pack("nm", [[3.0, 0.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0, 0]], PackOptions("f16", pattern=(1, 4)))
    assert stored(packed) == {"positions": bytes([0b0100]), "values": bytes.fromhex("00420000")}
    assert packed.nnz == 1
