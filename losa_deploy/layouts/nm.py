"""N:M: exactly N kept of every M positions of a row, so values have a fixed stride.

A row that is not a multiple of M is padded up to one. Its last group may keep fewer than N; the
free slots hold zero and point at positions beyond the row, so that they decode to
nothing and the mask stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, Layout, PackedTensor, PackOptions, Shapes, Unpacked, register
from losa_deploy.layouts.kept import kept_codes, packed_as, unpacked
from losa_deploy.layouts.streams import check_stream, load_stream, store_stream, stream_bytes
from losa_deploy.layouts.values import VALUE_TYPES, ValueType

MAX_M = 32
BLOCK_POSITIONS = 64
"""A kernel's step: positions of a row are padded to a multiple of it."""


def position_bits(n: int, m: int) -> int:
    """Bits of one position code (1, 2, 4 or 8), or 0 where M mask bits per group are used instead.

    Codes must be smaller, and whole groups must fill a block of 64 positions.
    """
    bits = next(b for b in (1, 2, 4, 8) if 2**b >= m)
    return bits if n * bits < m and BLOCK_POSITIONS % m == 0 else 0


def positions_row_bytes(n: int, m: int, in_features: int) -> int:
    """Bytes of a row's positions, padded to whole blocks of 64 positions."""
    per_block = BLOCK_POSITIONS // m * n * position_bits(n, m) if position_bits(n, m) else BLOCK_POSITIONS
    return -(-_width(m, in_features) // BLOCK_POSITIONS) * (per_block // 8)


def fits(mask: NDArray[np.bool_], n: int, m: int) -> bool:
    """True if every full group keeps exactly N and a short last group can be completed beyond the row."""
    in_features = mask.shape[1]
    full = in_features // m * m
    groups = mask[:, :full].reshape(mask.shape[0], -1, m)
    if not (np.count_nonzero(groups, axis=2) == n).all():
        return False
    if full == in_features:
        return True
    last = np.count_nonzero(mask[:, full:], axis=1)
    beyond = m - (in_features - full)
    return bool(((last <= n) & (last >= n - beyond)).all())


def find_pattern(mask: NDArray[np.bool_]) -> tuple[int, int] | None:
    """The (N, M) with the smallest M that the mask satisfies, or None."""
    if mask.size == 0 or mask.all():
        return None
    for m in range(2, MAX_M + 1):
        n = int(np.count_nonzero(mask[0, :m]))
        if 1 <= n < m <= mask.shape[1] and fits(mask[:4], n, m) and fits(mask, n, m):
            return n, m
    return None


def pack(weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions) -> PackedTensor:
    """positions: uint8 [out, row bytes]; values: the stream of out * groups * N slots.

    Raises `ValueError` if the mask does not keep N of every M.
    """
    pattern = options.pattern or find_pattern(mask)
    if pattern is None or not fits(mask, *pattern):
        raise ValueError(f"the mask does not keep {':'.join(map(str, pattern)) if pattern else 'N:M'}")
    (n, m), kind = pattern, VALUE_TYPES[options.value_type]
    slots = _slots(mask, n, m)
    codes, meaning = kept_codes(weight, mask, options)
    padded = np.zeros(slots.shape, kind.code)
    padded[:, : mask.shape[1]] = codes
    positions = store_positions(slots, n, m, mask.shape[1])
    arrays = {"positions": positions, "values": store_stream(padded, slots, kind), **meaning}
    return packed_as("nm", mask, options, arrays, n=n, m=m, position_bits=position_bits(n, m))


def unpack(packed: PackedTensor) -> Unpacked:
    """Scatter the slots; those beyond the row fall away."""
    n, m = packed.params["n"], packed.params["m"]
    in_features = packed.shape[1]
    slots = load_positions(packed.arrays["positions"], packed.shape, n, m)
    codes = load_stream(packed.arrays["values"], slots, VALUE_TYPES[packed.value_type])
    return unpacked(packed, codes[:, :in_features], slots[:, :in_features].copy())


def sizes(mask: NDArray[np.bool_], options: PackOptions) -> Mapping[str, int]:
    """Component → bytes; raises `ValueError` if no pattern fits."""
    pattern = options.pattern or find_pattern(mask)
    if pattern is None:
        raise ValueError("the mask satisfies no N:M pattern")
    (n, m), kind = pattern, VALUE_TYPES[options.value_type]
    rows, in_features = mask.shape
    counts = np.full(rows, -(-in_features // m) * n)
    return {
        "positions": rows * positions_row_bytes(n, m, in_features),
        "values": stream_bytes(counts, kind),
        **kind.meaning_bytes((rows, in_features), options),
    }


def known(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> bool:
    """N of at most 32, and the form of positions that these ask for."""
    del shape, kind
    n, m = params["n"], params["m"]
    return 1 <= n < m <= MAX_M and params["position_bits"] == position_bits(n, m)


def shapes(shape: tuple[int, int], kind: ValueType, params: Mapping[str, int]) -> Shapes:
    """Of positions, values and scale."""
    width = positions_row_bytes(params["n"], params["m"], shape[1])
    scale = kind.scale_shape(shape, params.get("group_size", 0))
    return {"positions": (shape[0], width), "values": None, "scale": scale}


def check(packed: PackedTensor) -> int:
    """N positions inside of each group, in the one order, and as many values."""
    (rows, columns), n, m = packed.shape, packed.params["n"], packed.params["m"]
    positions = packed.arrays["positions"]
    try:
        slots = load_positions(positions, packed.shape, n, m)
    except IndexError:
        raise ValueError("a position lies outside of its group") from None
    groups = slots.reshape(rows, -1, m)
    sound = bool((np.count_nonzero(groups, axis=2) == n).all())
    if not (sound and np.array_equal(store_positions(slots, n, m, columns), positions)):
        raise ValueError("positions lie outside of their row, or are not as many as their group has")
    check_stream(packed, np.full(rows, groups.shape[1] * n))
    return int(np.count_nonzero(slots[:, :columns]))


def form(packed: PackedTensor) -> str:
    """Mask bits or position codes."""
    return "NmCodes" if packed.params["position_bits"] else "NmBits"


def unpadded(packed: PackedTensor) -> bool:
    """Rows end with a whole group, and with a whole word of mask bits if they have some."""
    columns = packed.shape[1]
    words = packed.params["position_bits"] == 0
    return columns % packed.params["m"] == 0 and not (words and columns % BLOCK_POSITIONS)


def tolerates(mask: NDArray[np.bool_], options: PackOptions) -> bool:
    """Whether the mask follows the asked pattern, or any."""
    if options.pattern is None:
        return find_pattern(mask) is not None
    return fits(mask, *options.pattern)


def _slots(mask: NDArray[np.bool_], n: int, m: int) -> NDArray[np.bool_]:
    """Mask padded to whole groups [out, groups * M], with exactly N set in each group."""
    rows, in_features = mask.shape
    width = _width(m, in_features)
    slots = np.zeros((rows, width), np.bool_)
    slots[:, :in_features] = mask
    if width > in_features:
        missing = n - np.count_nonzero(slots[:, width - m :], axis=1)
        slots[:, in_features:] = np.arange(width - in_features)[None, :] < missing[:, None]
    return slots


def _width(m: int, in_features: int) -> int:
    """Positions of a row rounded up to whole groups."""
    return -(-in_features // m) * m


def store_positions(slots: NDArray[np.bool_], n: int, m: int, in_features: int) -> Component:
    """Mask bits, or the slots' positions within their group in ascending order, lowest bits first."""
    rows, bits = slots.shape[0], position_bits(n, m)
    if bits:
        codes = (np.nonzero(slots)[1] % m).astype(np.uint8).reshape(rows, -1)
        digits = np.unpackbits(codes[..., None], axis=2, bitorder="little")[..., :bits]
        packed = np.packbits(digits.reshape(rows, -1), axis=1, bitorder="little")
    else:
        packed = np.packbits(slots, axis=1, bitorder="little")
    positions = np.zeros((rows, positions_row_bytes(n, m, in_features)), np.uint8)
    positions[:, : packed.shape[1]] = packed
    return positions


def load_positions(positions: Component, shape: tuple[int, int], n: int, m: int) -> NDArray[np.bool_]:
    """Inverse of `store_positions`: bool [out, groups * M]; `IndexError` for a code beyond its group."""
    rows, bits = shape[0], position_bits(n, m)
    groups = -(-shape[1] // m)
    packed = positions.astype(np.uint8)
    if bits == 0:
        return np.unpackbits(packed, axis=1, count=groups * m, bitorder="little").astype(np.bool_)
    digits = np.unpackbits(packed, axis=1, count=groups * n * bits, bitorder="little")
    codes = digits.reshape(rows, groups, n, bits) @ _powers(bits)
    slots = np.zeros((rows, groups, m), np.bool_)
    np.put_along_axis(slots, codes.astype(np.intp), True, axis=2)
    return slots.reshape(rows, -1)


@cache
def _powers(bits: int) -> NDArray[np.int64]:
    return 1 << np.arange(bits, dtype=np.int64)


NM = register(
    Layout(
        "nm",
        2,
        ("NmBits", "NmCodes"),
        pack,
        unpack,
        sizes,
        known,
        shapes,
        check,
        form,
        unpadded,
        tolerates,
        parameters=("n", "m", "position_bits"),
    )
)
