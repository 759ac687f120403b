"""Literal bytes of small packed tensors, written out by hand from docs/formats.md."""

from __future__ import annotations

import hashlib

import numpy as np

from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.base import PackedTensor
from losa_deploy.layouts.blob import to_blob


def pack(layout: str, weight: list[list[float]], mask: list[list[int]], options: PackOptions) -> PackedTensor:
    return LAYOUTS[layout].pack(np.array(weight, np.float32), np.array(mask, np.bool_), options)


def stored(packed: PackedTensor) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in packed.arrays.items()}


SLACK = bytes(64)


def padded(values: bytes) -> bytes:
    """A short value stream: up to 64 bytes, then 64 zero bytes."""
    return values.ljust(64, b"\0") + SLACK


def test_bitmask_i8() -> None:
    packed = pack("bitmask", [[1.0, 9.0, -0.5], [9.0, 2.0, 0.0]], [[1, 0, 1], [0, 1, 1]], PackOptions("i8"))
    assert stored(packed) == {
        "positions": bytes([0b101, 0, 0, 0, 0, 0, 0, 0, 0b110, 0, 0, 0, 0, 0, 0, 0]),
        # -0.5 / (1/127) = -63.5 rounds to the even level -64; the kept zero keeps its slot.
        "values": padded(bytes([127, 256 - 64, 127, 0])),
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
            "values": padded(bytes.fromhex(values)),
        }


def test_a_full_stream_is_followed_by_64_zero_bytes_only() -> None:
    packed = pack("bitmask", [[1.0] * 64], [[1] * 64], PackOptions("i8"))
    assert stored(packed)["values"] == bytes([127] * 64) + SLACK


def test_bitmask_i4_rows_in_pairs_share_bytes() -> None:
    weight = [[4.0, 0.0, -3.0, 1.0], [0.0, -8.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    mask = [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    packed = pack("bitmask", weight, mask, PackOptions("i4", group_size=32))
    assert stored(packed) == {
        "positions": b"".join(bytes([bits, 0, 0, 0, 0, 0, 0, 0]) for bits in (0b1101, 0b10, 0b100)),
        # Row 0: scale 4 / -8 = -0.5, levels -8, 6, -2: low nibbles 8, 6, 14. Row 1: scale 1, level -8 in the
        # first high nibble. Row 2 starts a pair without a partner: scale -0.25, level -8.
        "values": padded(bytes([0x88, 0x06, 0x0E, 0x08])),
        "scale": bytes.fromhex("00b8003c00b4"),
        "table": bytes(range(8)) + bytes(range(0xF8, 0x100)),
    }


def test_dense_i4_row_is_split_in_halves() -> None:
    packed = pack("dense", [[8.0, 0.0, 1.0], [-8.0, -1.0, 0.0]], [[1] * 3] * 2, PackOptions("i4", 32))
    # Row 0: scale -1, levels -8, 0, -1; row 1: scale 1, levels -8, -1, 0. Positions 0 and 2 share a byte.
    assert stored(packed)["values"] == bytes([0xF8, 0x00, 0x08, 0x0F])
    assert stored(packed)["scale"] == bytes.fromhex("00bc003c")


def test_dense_i4_blocks_of_128_positions_and_a_shorter_last_one() -> None:
    levels = np.zeros((1, 132))
    levels[0, [0, 64, 127, 128, 130, 131]] = [-8, 1, 2, 3, 4, 5]
    values = pack("dense", levels.tolist(), [[1] * 132], PackOptions("i4", 128)).arrays["values"]
    # The last group has its own scale: 5 / -8; levels 3, 4, 5 become -4.8, -6.4, -8.
    assert values[0, [0, 63, 64, 65]].tolist() == [0x18, 0x20, 0xAB, 0x80]
    assert np.count_nonzero(values) == 4


def test_dense_i3_has_two_planes_per_block() -> None:
    levels = np.zeros((1, 140))
    levels[0, [0, 31, 32, 64, 96, 127, 15, 16, 128, 131, 139]] = [-4, 3, 2, 1, -1, -2, -3, 3, -4, 1, 2]
    packed = pack("dense", levels.tolist(), [[1] * 140], PackOptions("i3", 128))
    # Codes: the level, plus 8 below zero. 32 bytes of lower bits: position j + 32 k at bit 2 k of byte j.
    low, high = bytearray(32), bytearray(16)
    low[0] = 0 | 2 << 2 | 1 << 4 | 3 << 6  # positions 0, 32, 64, 96: -4, 2, 1, -1
    low[31] = 3 | 2 << 6  # positions 31 and 127: 3 and -2
    low[15], low[16] = 1, 3  # -3 and 3
    # 16 bytes of highest bits: position j + 16 k in bit k of byte j.
    high[0] = 1 << 0 | 1 << 6  # positions 0 and 96
    high[15] = 1 << 0 | 1 << 7  # positions 15 and 127
    # Then 12 positions: 3 bytes of lower bits (j, j + 3, ...), 2 bytes of highest (j, j + 2, ...).
    tail = bytes([0 << 0 | 1 << 2, 0, 2 << 6]) + bytes([1 << 0, 0])
    assert stored(packed) == {
        "values": bytes(low) + bytes(high) + tail,
        "scale": bytes.fromhex("003c003c"),
        "table": bytes([0, 1, 2, 3, 0xFC, 0xFD, 0xFE, 0xFF]) + bytes(8),
    }


def test_streams_of_i3_are_rows_of_planes() -> None:
    weight, mask = np.zeros((3, 20)), np.zeros((3, 20), int)
    mask[0, ::2] = 1  # 10 codes: 3 bytes of lower bits, 2 of the highest
    weight[0, [0, 6, 12, 16, 18]] = [-4, 3, 2, -2, -1]  # the kept ones number 0, 3, 6, 8, 9
    mask[2, [1, 3]] = 1  # row 1 keeps nothing and takes no byte; of row 2 one byte for each plane
    weight[2, [1, 3]] = [-4, 1]
    packed = pack("bitmask", weight.tolist(), mask.tolist(), PackOptions("i3", 32))
    low = bytes([0 | 3 << 2 | 2 << 4 | 3 << 6, 0, 2 << 4])  # j, j + 3, j + 6, j + 9
    high = bytes([1 << 0 | 1 << 4, 1 << 4])  # j, j + 2, ...: 0 and 8; 9
    assert stored(packed) == {
        "positions": bytes([0x55, 0x55, 0x05, 0, 0, 0, 0, 0]) + bytes(8) + bytes([0x0A]) + bytes(7),
        "values": padded(low + high + bytes([1 << 2, 1])),
        "scale": bytes.fromhex("003c0080003c"),
        "table": bytes([0, 1, 2, 3, 0xFC, 0xFD, 0xFE, 0xFF]) + bytes(8),
    }


def test_a_row_of_a_stream_of_i3_is_a_dense_row_of_what_is_kept() -> None:
    levels = np.resize([-4, 3, 2, 1, -1, -2, -3, 0], 300)
    kept = [[float(level) for level in levels]] * 2
    spread = [[value for level in row for value in (level, 0.0)] for row in kept]
    of_rows = pack("dense", kept, [[1] * 300] * 2, PackOptions("i3", 128)).arrays["values"].tobytes()
    end = bytes(-len(of_rows) % 64) + SLACK
    assert len(of_rows) == 2 * (2 * 48 + 11 + 6)
    for layout, pattern in (("bitmask", None), ("nm", (1, 2))):
        options = PackOptions("i3", 128, pattern=pattern)
        packed = pack(layout, spread, [[1, 0] * 300] * 2, options)
        assert stored(packed)["values"] == of_rows + end


def test_pairs_of_rows_store_their_mask_once() -> None:
    mask = [[1, 0, 1]] * 2 + [[0, 1, 0]]
    i8 = pack(
        "bitmask", [[1.0, 9.0, -0.5], [2.0, 9.0, 0.0], [0, 4.0, 0]], mask, PackOptions("i8", rows_per_mask=2)
    )
    positions = bytes([0b101, 0, 0, 0, 0, 0, 0, 0, 0b010, 0, 0, 0, 0, 0, 0, 0])
    assert stored(i8) == {
        "positions": positions,
        "values": padded(bytes([127, 256 - 64, 127, 0, 127])),
        "scale": np.array([1 / 127, 2 / 127, 4 / 127], "<f4").tobytes(),
    }
    i4 = pack(
        "bitmask",
        [[8.0, 0.0, 1.0], [-8.0, 0.0, 3.0], [0, -8.0, 0]],
        mask,
        PackOptions("i4", 32, rows_per_mask=2),
    )
    # Row 0: scale -1, levels -8 and -1; row 1: scale 1, levels -8 and 3; row 2 has no partner.
    assert stored(i4)["positions"] == positions
    assert stored(i4)["values"] == padded(bytes([0x88, 0x3F, 0x08]))
    for packed in (i8, i4):
        assert packed.params["rows_per_mask"] == 2
        assert to_blob(packed)[8:14] == bytes([1, *to_blob(packed)[9:11], 2, 0, 0])


def test_pairs_of_rows_of_i3_are_one_row_of_planes() -> None:
    weight, mask = np.zeros((3, 20)), np.zeros((3, 20), int)
    mask[:2, ::2] = 1  # 10 codes of each row, filled up to 12: 24 codes in 6 + 3 bytes
    weight[0, [0, 6, 12, 16, 18]] = [-4, 3, 2, -2, -1]  # the kept ones number 0, 3, 6, 8, 9
    weight[1, [0, 10, 18]] = [1, -4, 2]  # 0, 5, 9: numbers 12, 17, 21 of the pair
    mask[2, [1, 3]] = 1  # alone: 4 codes of its own, 4 of nobody
    weight[2, [1, 3]] = [-4, 1]
    packed = pack("bitmask", weight.tolist(), mask.tolist(), PackOptions("i3", 32, rows_per_mask=2))
    # Byte j of the lower bits: numbers j, j + 6, j + 12, j + 18; of the highest: j, j + 3, ...
    low = bytes([2 << 2 | 1 << 4, 0, 2 << 2, 3 | 3 << 2 | 2 << 6, 0, 0])
    high = bytes([1 << 0 | 1 << 3, 0, 1 << 2 | 1 << 5])
    alone = bytes([0, 1]) + bytes([1])
    assert stored(packed) == {
        "positions": bytes([0x55, 0x55, 0x05, 0, 0, 0, 0, 0]) + bytes([0x0A]) + bytes(7),
        "values": padded(low + high + alone),
        "scale": bytes.fromhex("003c003c003c"),
        "table": bytes([0, 1, 2, 3, 0xFC, 0xFD, 0xFE, 0xFF]) + bytes(8),
    }


def test_blocks_of_a_pair_of_rows_of_i3_have_64_codes_of_each() -> None:
    levels = np.resize([-4, 3, 2, 1, -1, -2, -3], (2, 72))
    packed = pack("bitmask", levels.tolist(), [[1] * 72] * 2, PackOptions("i3", 128, rows_per_mask=2))
    even, odd = levels.tolist()
    rows = [[*even[:64], *odd[:64]], [*even[64:], *odd[64:], *[0] * 112]]
    blocks = pack("dense", rows, [[1] * 128] * 2, PackOptions("i3", 128)).arrays["values"]
    assert stored(packed)["values"][:48] == blocks[0].tobytes()
    short = pack("dense", [rows[1][:16]], [[1] * 16], PackOptions("i3", 128)).arrays["values"]
    assert stored(packed)["values"] == (blocks[0].tobytes() + short.tobytes()).ljust(64, b"\0") + SLACK


def test_nm_2_of_4_stores_mask_bits() -> None:
    mask = [[1, 0, 0, 1, 0, 1, 1, 0]]
    packed = pack("nm", [[1.0] * 8], mask, PackOptions("f16", pattern=(2, 4)))
    assert stored(packed) == {
        "positions": bytes([0b01101001, 0, 0, 0, 0, 0, 0, 0]),
        "values": padded(bytes.fromhex("003c" * 4)),
    }
    assert packed.params["position_bits"] == 0


def test_nm_1_of_4_stores_two_bit_codes() -> None:
    mask = [[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1]]
    packed = pack("nm", [[2.0] * 12], mask, PackOptions("f16", pattern=(1, 4)))
    assert stored(packed) == {
        "positions": bytes([0b110010, 0, 0, 0]),
        "values": padded(bytes.fromhex("0040" * 3)),
    }
    assert packed.params["position_bits"] == 2


def test_nm_short_last_group_points_beyond_the_row() -> None:
    """1:4 with 5 columns, the last one pruned: the free slot is position 1 of the group (column 5)."""
    packed = pack("nm", [[3.0, 0.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0, 0]], PackOptions("f16", pattern=(1, 4)))
    assert stored(packed) == {
        "positions": bytes([0b0100, 0, 0, 0]),
        "values": padded(bytes.fromhex("00420000")),
    }
    assert packed.nnz == 1


def tiles_of_three_kept() -> tuple[list[list[float]], list[list[int]]]:
    """Every row keeps the positions 1, 4 and 9; only the rows 0 and 9 have weights other than zero."""
    weight = [[0.0] * 16 for _ in range(16)]
    weight[0][1], weight[0][4], weight[0][9], weight[9][9] = -8.0, 3.0, 1.0, 4.0
    return weight, [[int(i in (1, 4, 9)) for i in range(16)]] * 16


def test_tiled_i4_has_the_position_below_the_code() -> None:
    packed = pack("tiled", *tiles_of_three_kept(), PackOptions("i4", 32))
    # Two steps of 32 slots; bytes 4 i + 2 h and the next are slots of row 8 h + i. Row 0 has scale 1 and
    # codes 8, 3, 1; row 9 scale -0.5 and code 8. The second slots of the second step are free.
    first, second = bytearray(b"\x01\x04" * 16), bytearray(b"\x09\x00" * 16)
    first[0:2], second[0], second[6] = b"\x81\x34", 0x19, 0x89
    scale = [b"\x00\x80"] * 16  # 0 / -8
    scale[0], scale[9] = b"\x00\x3c", b"\x00\xb8"
    assert stored(packed) == {
        "values": bytes(first + second),
        "scale": b"".join(scale),
        "table": bytes(range(8)) + bytes(range(0xF8, 0x100)),
    }
    assert dict(packed.params) == {"n": 3, "m": 16, "group_size": 32} and packed.nnz == 48


def test_tiled_i8_has_positions_in_nibbles() -> None:
    packed = pack("tiled", *tiles_of_three_kept(), PackOptions("i8"))
    # Byte j of a step's positions belongs to the slots j and j + 16.
    first, second = bytearray(32), bytearray(32)
    first[0:2], second[0], second[6] = bytes([256 - 127, 48]), 16, 127
    scale = np.zeros(16, "<f4")
    scale[0], scale[9] = 8 / 127, 4 / 127
    assert stored(packed) == {
        "positions": b"\x11\x44" * 8 + b"\x99\x00" * 8,
        "values": bytes(first + second),
        "scale": scale.tobytes(),
    }


def test_tiles_follow_rows_then_columns() -> None:
    """32 x 32 that keep 1 of 16, tile after tile, and scales of a tile together."""
    mask = [[int(i in (2, 16 + 7)) for i in range(32)]] * 16 + [
        [int(i in (5, 16 + 11)) for i in range(32)]
    ] * 16
    packed = pack("tiled", [[0.0] * 32] * 32, mask, PackOptions("i4", 32))
    steps = b"".join(bytes([position, 0] * 16) for position in (2, 7, 5, 11))
    assert stored(packed)["values"] == steps
    assert packed.arrays["scale"].shape == (2, 1, 16)


def test_tiles_of_two_of_four_share_lines() -> None:
    """16 columns: a step for each quad; a line has the positions of four, or the codes of two."""
    weight = [[0.0] * 16 for _ in range(16)]
    weight[0][1], weight[0][11], weight[9][14] = -8.0, 3.0, 4.0
    mask = [[int(i in (1, 3, 4, 5, 10, 11, 12, 14)) for i in range(16)]] * 16
    packed = pack("tiled", weight, mask, PackOptions("i4", 32))
    # First slots at 1, 0, 2, 0 of their quads, second ones at 3, 1, 3, 2; the first step in the lowest bits.
    line = bytes([1 | 0 << 2 | 2 << 4 | 0 << 6, 3 | 1 << 2 | 3 << 4 | 2 << 6])
    codes = bytearray(64)
    codes[0] = 0x08  # row 0, quad 0, first slot, scale 1
    codes[32 + 1] = 0x03  # row 0, quad 2, second slot
    codes[32 + 6 + 1] = 0x80  # row 9, quad 3, second slot, scale -0.5
    scale = [b"\x00\x80"] * 16  # 0 / -8
    scale[0], scale[9] = b"\x00\x3c", b"\x00\xb8"
    assert stored(packed) == {
        "positions": line * 16,
        "values": bytes(codes),
        "scale": b"".join(scale),
        "table": bytes(range(8)) + bytes(range(0xF8, 0x100)),
    }
    assert dict(packed.params) == {"n": 2, "m": 4, "group_size": 32} and packed.nnz == 128


def test_sliding_windows_share_lines() -> None:
    """16 columns: eight slots in windows that start at -1, 1, 3, ... 13; codes and scales as of 2:4."""
    weight = [[0.0] * 16 for _ in range(16)]
    weight[0][2], weight[0][12], weight[9][15] = -8.0, 3.0, 4.0
    mask = [[int(i in (2, 3, 6, 7, 8, 12, 13, 15)) for i in range(16)]] * 16
    packed = pack("sliding", weight, mask, PackOptions("i4", 32))
    # 2 - -1, 6 - 3, 8 - 7, 13 - 11 of the even slots; 3 - 1, 7 - 5, 12 - 9, 15 - 13 of the odd ones.
    line = bytes([3 | 3 << 2 | 1 << 4 | 2 << 6, 2 | 2 << 2 | 3 << 4 | 2 << 6])
    codes = bytearray(64)
    codes[0] = 0x08  # row 0, first step, first slot, scale 1
    codes[32 + 1] = 0x03  # row 0, third step, second slot
    codes[32 + 6 + 1] = 0x80  # row 9, fourth step, second slot, scale -0.5
    scale = [b"\x00\x80"] * 16  # 0 / -8
    scale[0], scale[9] = b"\x00\x3c", b"\x00\xb8"
    assert stored(packed) == {
        "positions": line * 16,
        "values": bytes(codes),
        "scale": b"".join(scale),
        "table": bytes(range(8)) + bytes(range(0xF8, 0x100)),
    }
    assert dict(packed.params) == {"group_size": 32} and packed.nnz == 128
    assert to_blob(packed)[8:16] == bytes([4, 3, 2, 0, 0, 0, 32, 0])


def test_tiles_of_i3_have_lines_of_each_plane() -> None:
    """80 columns that keep 1 of 4: ten steps, so three lines of lower bits, then two of highest ones."""
    weight = [[0.0] * 80 for _ in range(16)]
    weight[0][0], weight[0][8 * 8], weight[0][9 * 8 + 4], weight[9][8 * 5] = -4.0, 3.0, -3.0, 2.0
    mask = [[int(i % 4 == 0) for i in range(80)]] * 16
    packed = pack("tiled", weight, mask, PackOptions("i3", 128))
    lines = [bytearray(32) for _ in range(5)]
    lines[3][0] = 1 << 0  # row 0, step 0: code 4
    lines[2][0] = 3 << 0  # step 8: code 3
    lines[2][1], lines[4][1] = 1 << 2, 1 << 1  # step 9, second slot: code 5
    lines[3][6] = 1 << 5  # row 9, step 5: scale -0.5, level -4
    scale = [b"\x00\x80"] * 16  # 0 / -4
    scale[0], scale[9] = b"\x00\x3c", b"\x00\xb8"
    assert stored(packed) == {
        "positions": bytes(96),
        "values": b"".join(lines),
        "scale": b"".join(scale),
        "table": bytes([0, 1, 2, 3, 0xFC, 0xFD, 0xFE, 0xFF]) + bytes(8),
    }


def test_tiles_of_one_of_four_take_two_quads_a_step() -> None:
    """48 columns: six steps, so that the second line of positions is half empty; i8 values stay bytes."""
    mask = [[int(i % 4 == i // 4 % 3) for i in range(48)]] * 16  # at 0, 1, 2, 0, 1, 2, ... of their quads
    weight = [[127.0 if i == 5 else 1.0 for i in range(48)]] * 16
    packed = pack("tiled", weight, mask, PackOptions("i8"))
    steps = [(0, 1), (2, 0), (1, 2), (0, 1), (2, 0), (1, 2)]
    lines = [
        bytes(sum(step[k] << 2 * s for s, step in enumerate(four)) for k in (0, 1))
        for four in (steps[:4], steps[4:])
    ]
    assert stored(packed) == {
        "positions": lines[0] * 16 + lines[1] * 16,
        "values": bytes([1, 127] * 16) + bytes([1] * 160),
        "scale": np.ones(16, "<f4").tobytes(),
    }
