"""Damaged packed tensors: the loader refuses them or the kernels stay inside their memory.

Every case runs in a build with the address and undefined-behaviour sanitizers, on buffers exactly as
large as the data, in every x86 target.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.blob import from_blob, to_blob

pytestmark = pytest.mark.slow
RunCases = Callable[..., list[tuple[int, NDArray[np.float32]]]]
Statuses = Callable[..., list[int]]
SlidingMask = Callable[[int, int, int], NDArray[np.bool_]]
ROWS, COLUMNS, TOKENS = 11, 172, 2
OK, NULL_POINTER, BAD_HEADER, BAD_PARAMETER, BAD_SIZE, BAD_POSITIONS, BAD_RANGE = range(7)


@pytest.fixture(scope="session")
def program(sanitized: Callable[[str], Path]) -> Path:
    return sanitized("run_cases")


def blob_of(layout: str, value_type: str, columns: int = COLUMNS) -> bytes:
    rng = np.random.default_rng(1)
    name, _, pattern = layout.partition(" ")
    rows = 16 if name == "tiled" else ROWS
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    mask = rng.random((rows, columns)) < 0.5
    n_of_m, shared = None, 1
    if pattern == "pairs":
        mask, shared = np.repeat(mask[::2], 2, axis=0)[:rows], 2
    elif pattern:
        n_of_m = n, m = tuple(map(int, pattern.split(":")))  # type: ignore[assignment]
        mask = np.arange(columns)[None].repeat(rows, 0) % m < n
    options = PackOptions(value_type, 64, pattern=n_of_m, rows_per_mask=shared)
    return to_blob(LAYOUTS[name].pack(weight, mask, options))


@pytest.fixture
def statuses(program: Path, run_cases: RunCases) -> Statuses:
    """A function: target, blobs, width → the status of each; a sanitizer's report fails the test."""

    def run(target: str, blobs: Sequence[bytes], columns: int = COLUMNS) -> list[int]:
        x = np.ones((TOKENS, columns), np.float32)
        return [status for status, _ in run_cases([str(program)], target, [(b, x, 16) for b in blobs])]

    return run


@pytest.fixture(scope="session")
def targets(program: Path) -> list[str]:
    return subprocess.check_output([str(program), "list"], text=True).split()


def damaged(blob: bytes) -> Iterator[bytes]:
    """Truncations, flipped bytes anywhere, and extreme numbers in every field of the header."""
    rng = np.random.default_rng(len(blob))
    for size in (0, 1, 127, 128, 129, len(blob) - 1, *rng.integers(0, len(blob), 60)):
        yield blob[: int(size)]
    for where in (*range(128), *rng.integers(128, len(blob), 300)):
        for value in (0, 255, int(rng.integers(256))):
            yield blob[:where] + bytes([value]) + blob[where + 1 :]
    for where in (16, 20):
        for number in (0, 1, 2**31, 2**32 - 1):
            yield blob[:where] + struct.pack("<I", number) + blob[where + 4 :]
    for where in range(32, 96, 8):
        for number in (0, 63, 64, len(blob) - 64, len(blob), 2**63, 2**64 - 64, 2**64 - 1):
            yield blob[:where] + struct.pack("<Q", number) + blob[where + 8 :]


SPARSE = ("bitmask", "nm 2:4", "nm 1:4", "nm 3:5", "nm 3:16")
TYPES = ("f32", "f16", "i8", "i4", "i3")
STREAMS = (
    *((layout, kind) for layout in ("dense", *SPARSE) for kind in TYPES),
    *(("bitmask pairs", kind) for kind in ("i8", "i4", "i3")),
)


@pytest.mark.parametrize(("layout", "value_type"), STREAMS)
def test_no_damage_reads_outside(
    statuses: Statuses, targets: list[str], layout: str, value_type: str
) -> None:
    check_damage(statuses, targets, blob_of(layout, value_type), COLUMNS)


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_no_damage_of_sliding_windows_reads_outside(
    statuses: Statuses, targets: list[str], sliding_mask: SlidingMask, value_type: str
) -> None:
    check_damage(statuses, targets, sliding_blob(sliding_mask, value_type, 176), 176)


def sliding_blob(sliding_mask: SlidingMask, value_type: str, columns: int) -> bytes:
    weight = np.random.default_rng(1).standard_normal((16, columns)).astype(np.float32)
    return to_blob(LAYOUTS["sliding"].pack(weight, sliding_mask(16, columns, 0), PackOptions(value_type, 64)))


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_positions_of_sliding_windows_ascend_inside_of_their_row(
    statuses: Statuses, sliding_mask: SlidingMask, value_type: str
) -> None:
    """48 columns: codes 1, 0, 0 ... of row 0, bytes 0 and 1; 3, 3 ... 2 of row 1, bytes 4 and 5."""
    blob = sliding_blob(sliding_mask, value_type, 48)
    line = struct.unpack_from("<Q", blob, 32)[0]
    assert (blob[line], blob[line + 4], blob[line + 64 + 5]) == (0x01, 0xFF, 0xBF)
    lies = {
        0: 0x00,  # the first slot before the row
        1: 0x02,  # code 2, then 0: both at the same position
        4: 0xF3,  # 3, then 0
        64 + 5: 0xFF,  # the last slot behind the row
    }
    damaged = [blob[: line + at] + bytes([byte]) + blob[line + at + 1 :] for at, byte in lies.items()]
    assert statuses("scalar", [blob, *damaged], 48) == [OK, *[BAD_POSITIONS] * 4]
    for lie in damaged:
        with pytest.raises(ValueError, match="do not ascend"):
            from_blob(lie)


TILES = tuple((f"tiled {n}", kind) for n in ("6:16", "5:16", "2:4", "1:4") for kind in ("i8", "i4"))


@pytest.mark.parametrize(("layout", "value_type"), [*TILES, ("tiled 2:4", "i3"), ("tiled 1:4", "i3")])
def test_no_damage_of_tiles_reads_outside(
    statuses: Statuses, targets: list[str], layout: str, value_type: str
) -> None:
    check_damage(statuses, targets, blob_of(layout, value_type, 176), 176)


def check_damage(statuses: Statuses, targets: Sequence[str], blob: bytes, columns: int) -> None:
    blobs = [blob, *damaged(blob)]
    for target in targets:
        # Emulation is slow: there a sample, which holds what the loader lets pass.
        chosen = blobs[::31] if target.startswith(("avx512", "avxvnni")) else blobs
        found = statuses(target, chosen, columns)
        assert found[0] == OK and found.count(OK) > 1, target
        assert {BAD_HEADER, BAD_SIZE, BAD_RANGE} & set(found), target
        assert len(set(found)) >= 4 or len(chosen) < len(blobs), target


@pytest.mark.parametrize("value_type", TYPES)
@pytest.mark.parametrize("columns", [64, 128, 256])
def test_a_last_group_beyond_the_padding_stays_inside(
    statuses: Statuses, targets: list[str], columns: int, value_type: str
) -> None:
    """Groups of 5 and 24 do not divide these widths, which need no padding otherwise."""
    blobs = [blob_of(layout, value_type, columns) for layout in ("nm 3:5", "nm 3:24")]
    for target in targets:
        assert statuses(target, blobs, columns) == [OK, OK], target


def test_each_lie_is_named(statuses: Statuses) -> None:
    blob = blob_of("bitmask", "i8")
    positions, size, _, values = struct.unpack_from("<QQQQ", blob, 32)
    codes = blob_of("nm 1:8", "i8")
    lies = {
        BAD_HEADER: b"LOSX" + blob[4:],
        BAD_PARAMETER: blob[:9] + bytes([7]) + blob[10:],
        # 64 values too few; a mask bit outside of the 172 columns; positions where the values are.
        BAD_SIZE: blob[:56] + struct.pack("<Q", values - 64) + blob[64:],
        BAD_POSITIONS: blob[: positions + 22] + bytes([0xF0]) + blob[positions + 23 :],
        BAD_RANGE: blob[:32] + struct.pack("<Q", positions + 64) + blob[40:],
    }
    assert statuses("scalar", list(lies.values())) == list(lies)
    assert size == ROWS * 24
    outside = codes[:128] + bytes([0x0F]) + codes[129:]  # code 15 in a group of 8
    assert statuses("scalar", [codes, outside]) == [OK, BAD_POSITIONS]


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_lies_about_rows_that_share_masks_are_named(statuses: Statuses, value_type: str) -> None:
    blob = blob_of("bitmask pairs", value_type)
    positions, size, _, values = struct.unpack_from("<QQQQ", blob, 32)
    assert size == (ROWS + 1) // 2 * 24
    lies = [
        (BAD_PARAMETER, blob[:11] + b"\x01" + blob[12:]),
        (BAD_PARAMETER, blob[:11] + b"\x04" + blob[12:]),
        (BAD_PARAMETER, blob[:9] + b"\x01" + blob[10:]),  # f16
        (BAD_SIZE, blob[:11] + b"\x00" + blob[12:]),  # a mask for each row
        (BAD_SIZE, blob[:16] + struct.pack("<I", ROWS - 1) + blob[20:]),
        (BAD_SIZE, blob[:56] + struct.pack("<Q", values - 64) + blob[64:]),
        (BAD_SIZE, blob[:positions] + b"\xff" * 21 + blob[positions + 21 :]),  # a mask of more values
        (BAD_POSITIONS, blob[: positions + 22] + b"\xf0" + blob[positions + 23 :]),
    ]
    assert statuses("scalar", [blob, *(lie for _, lie in lies)]) == [OK, *(status for status, _ in lies)]


def test_planes_of_i3_end_in_zeros(statuses: Statuses) -> None:
    blob = blob_of("tiled 1:4", "i3", 48)  # six steps: two lines of lower bits, then one of the highest
    values = struct.unpack_from("<QQQ", blob, 32)[2]
    lies = [
        blob[:at] + bytes([blob[at] | wrong]) + blob[at + 1 :]
        for at, wrong in ((values + 32, 0x10), (values + 64, 0x40), (values + 95, 0x80))
    ]
    assert statuses("scalar", [blob, *lies], 48) == [OK, *[BAD_POSITIONS] * 3]


@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_positions_of_quads_ascend_and_free_bits_are_zero(statuses: Statuses, value_type: str) -> None:
    for pattern, at, wrong in (("2:4", 0, 0x01), ("1:4", 32, 0x10)):  # 48 columns: a line and a half of 1:4
        blob = blob_of(f"tiled {pattern}", value_type, 48)
        where = struct.unpack_from("<Q", blob, 32)[0] + at
        lie = blob[:where] + bytes([wrong]) + blob[where + 1 :]
        assert statuses("scalar", [blob, lie], 48) == [OK, BAD_POSITIONS]


@pytest.mark.parametrize("value_type", ["i8", "i4"])
def test_positions_of_tiles_ascend_and_free_slots_are_zero(statuses: Statuses, value_type: str) -> None:
    blob = blob_of("tiled 3:16", value_type, 64)  # positions 0, 1, 2: bytes 00 01 ..., then 02 00 ...
    positions, _, values = struct.unpack_from("<QQQ", blob, 32)
    first, free = (values, values + 33) if value_type == "i4" else (positions, values + 33)
    lies = [blob[:first] + bytes([0x11]) + blob[first + 1 :], blob[:free] + b"\x20" + blob[free + 1 :]]
    if value_type == "i8":
        lies.append(blob[: positions + 17] + b"\x01" + blob[positions + 18 :])  # position of a free slot
    found = statuses("scalar", [blob, *lies], 64)
    assert found == [OK] + [BAD_POSITIONS] * len(lies)


UNDER_A_LIMIT = """
import resource
import numpy as np
from losa_deploy import _native
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
nothing, table = np.zeros(0, np.uint8), np.zeros(16, np.uint8)
for value_type, scale_type, group, level in ((0, 0, 0, nothing), (2, 1, 0, nothing), (3, 2, 64, table)):
    for rows, columns in ((2**30, 1), (2**30, 2**30), (2**32 - 1, 64)):
        try:
            _native.Tensor(
                1, value_type, rows, columns, scale_type, 0, 0, 0, group, nothing, nothing, nothing, level
            )
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux counts it")
def test_rows_that_no_byte_bears_out_cost_no_memory() -> None:
    """Row starts of a bitmask take 8 bytes each: 8 GB for a shape alone, in a process that may take 64 MB."""
    done = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT], capture_output=True, text=True, check=True)
    size, parameter = (
        "a component has not the bytes",
        "a layout, type, shape or pattern outside of the format",
    )
    expected = [size, size, parameter] * 3
    answers = done.stdout.splitlines()
    assert len(answers) == len(expected)
    for answer, text in zip(answers, expected, strict=True):
        assert answer.startswith(f"RuntimeError {text}")
