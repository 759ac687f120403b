"""Which layout a tensor gets: sparse only where that saves bytes (law 4).

`native/format/choose.cpp` is the same rule for weights that are packed when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import UsageError
from losa_deploy.layouts import bitmask, nm, sliding, tiled
from losa_deploy.layouts.base import LAYOUTS, PackOptions
from losa_deploy.layouts.bitmask import BITMASK
from losa_deploy.layouts.dense import DENSE
from losa_deploy.layouts.nm import NM
from losa_deploy.layouts.sliding import SLIDING
from losa_deploy.layouts.steps import TILE
from losa_deploy.layouts.streams import rows_together
from losa_deploy.layouts.tiled import TILED
from losa_deploy.layouts.values import VALUE_TYPES, by_bits

PATTERNED = ("nm", "tiled")
"""Layouts that need a fixed N of every M."""
Pattern = tuple[int, int]


@dataclass(frozen=True)
class Terms:
    """What differs between a weight for a file and one that is packed when it is loaded."""

    tiles_may_cost: float
    """Bytes of tiles per byte of the smallest other sparse layout, for a mask without a pattern."""
    start_bytes: int
    """Held for each row (of those that share bytes, for all of them) of a stream of values."""
    exact: bool
    """The mask is data. Otherwise it was found from zeros: a kept weight that is zero is missing in it, so
    that tiles may have slots without one, and of the other patterns only 2:4 and 4:8 are looked for."""


IN_FILE = Terms(1.0, 0, True)
AT_LOAD = Terms(1.5, 8, False)


@dataclass(frozen=True)
class Choice:
    """A layout, the options to pack with (the pattern filled in), its bytes, and why."""

    layout: str
    options: PackOptions
    bytes: int
    reason: str


@dataclass(frozen=True)
class _Tiles:
    """A way to store a mask in tiles: `tiled` of a pattern, or `sliding`, which has none."""

    layout: str
    bytes: int
    pattern: Pattern = (0, 0)

    def chosen(self, options: PackOptions, reason: str) -> Choice:
        if self.layout == "tiled":
            options = replace(options, pattern=self.pattern)
        return Choice(self.layout, options, self.bytes, reason)


def choose(mask: NDArray[np.bool_], options: PackOptions, terms: Terms = IN_FILE) -> Choice:
    """The smallest layout for a mask [out, in]; on a tie dense, or the sparse one that computes fastest.

    Tiles, of a pattern or of sliding windows, compute several times as fast as a mask whose bits have to be
    counted, and may cost more bytes than it, but fewer than dense: any number if the mask keeps N of 16 and
    follows no shorter pattern, because it was made for tiles; none if it follows a pattern whose M divides 8,
    which needs no count; else as `terms` say. `AT_LOAD` gives tiles that have free slots to masks that `pack`
    of the layout would refuse.
    """
    dense_bytes = DENSE.size(mask, options)
    if mask.all():
        return Choice("dense", options, dense_bytes, "nothing is pruned")
    kind = VALUE_TYPES[options.value_type]
    bitmask_bytes = BITMASK.size(mask, options)
    reason = f"{mask.mean():.0%} kept: bitmask takes {_share(bitmask_bytes, dense_bytes)}"
    best = Choice("bitmask", options, bitmask_bytes, reason)
    pattern = nm.find_pattern(mask) if terms.exact else _find_half(mask)
    if pattern is not None:
        best = _smaller(best, mask, replace(options, pattern=pattern), dense_bytes)
    tiles = _find_tiles(mask, options, terms.exact)
    if tiles is not None:
        scales = sum(kind.meaning_bytes((mask.shape[0], mask.shape[1]), options).values())
        if tiles.bytes < dense_bytes and _may_cost(tiles.bytes, best.bytes, scales, pattern, terms):
            name = "sliding windows" if tiles.layout == "sliding" else _name(pattern or tiles.pattern)
            compared = f"{best.layout} {_share(best.bytes, dense_bytes)} but slower"
            reason = f"{name} mask in tiles: {_share(tiles.bytes, dense_bytes)}, {compared}"
            return tiles.chosen(options, reason)
    if best.layout == "bitmask":
        best = _shared(best, mask if terms.exact else bitmask.share(mask), dense_bytes)
    streams = -(-len(mask) // rows_together(kind, paired=best.options.rows_per_mask > 1))
    if best.bytes + streams * terms.start_bytes < dense_bytes:
        return best
    return Choice("dense", options, dense_bytes, reason)


def _shared(best: Choice, mask: NDArray[np.bool_], dense_bytes: int) -> Choice:
    """The bitmask with one mask for each pair of rows, if they have the same and that is smaller."""
    if not bitmask.can_share(VALUE_TYPES[best.options.value_type]) or not bitmask.paired(mask):
        return best
    options = replace(best.options, rows_per_mask=bitmask.PAIR)
    size = BITMASK.size(mask, options)
    if size >= best.bytes:
        return best
    reason = f"{mask.mean():.0%} kept: bitmask of pairs of rows takes {_share(size, dense_bytes)}"
    return Choice("bitmask", options, size, reason)


def _smaller(best: Choice, mask: NDArray[np.bool_], options: PackOptions, dense_bytes: int) -> Choice:
    """N:M if it is smaller than `best`, the bitmask, or as small and every mask byte keeps the same count."""
    assert options.pattern is not None
    size = NM.size(mask, options)
    if size > best.bytes or (size == best.bytes and 8 % options.pattern[1]):
        return best
    compared = f"bitmask {_share(best.bytes, dense_bytes)}"
    reason = f"{_name(options.pattern)} mask: {_share(size, dense_bytes)}, {compared}"
    return Choice("nm", options, size, reason)


def _may_cost(tiles: int, smallest: int, scales: int, pattern: Pattern | None, terms: Terms) -> bool:
    """Whether tiles are worth their bytes, beside those of the smallest other sparse layout."""
    if tiles <= smallest or (pattern is not None and pattern[1] == tiled.WIDE):
        return True
    counted = pattern is None or 8 % pattern[1] != 0
    return counted and tiles - scales < terms.tiles_may_cost * (smallest - scales)


def _find_half(mask: NDArray[np.bool_]) -> Pattern | None:
    """2:4 or 4:8 in whole groups."""
    halves = ((m // 2, m) for m in (4, 8) if mask.shape[1] % m == 0 and nm.fits(mask, m // 2, m))
    return next(halves, None)


def _find_tiles(mask: NDArray[np.bool_], options: PackOptions, exact: bool) -> _Tiles | None:
    """The smallest tiles that hold a mask, if there are any; of equal ones the first of `_all_tiles`."""
    rows, columns = mask.shape
    if rows % TILE or columns % TILE or not mask.any():
        return None
    return min(_all_tiles(mask, options, exact), key=lambda tiles: tiles.bytes, default=None)


def _all_tiles(mask: NDArray[np.bool_], options: PackOptions, exact: bool) -> Iterator[_Tiles]:
    """1:4 or 2:4, sliding windows where it is neither, and N:16."""
    kind, quads = VALUE_TYPES[options.value_type], _tiles_of(mask, options, tiled.SHORT, exact)
    if quads is not None:
        yield quads
    elif SLIDING.stores(kind):
        slots = mask if exact else sliding.complete(mask)
        if slots is not None and sliding.tolerates(slots, options):
            yield _Tiles("sliding", SLIDING.size(slots, options))
    wide = _tiles_of(mask, options, tiled.WIDE, exact)
    if wide is not None:
        yield wide


def _tiles_of(mask: NDArray[np.bool_], options: PackOptions, m: int, exact: bool) -> _Tiles | None:
    """Tiles of the smallest N of M that suffices, if `exact` only where every group keeps so many."""
    groups = mask[:1, :m] if exact else mask.reshape(-1, m)
    n = int(np.count_nonzero(groups, axis=1).max())
    if not tiled.holds(VALUE_TYPES[options.value_type], m) or not tiled.known_pattern(n, m):
        return None
    if exact and not nm.fits(mask, n, m):
        return None
    return _Tiles("tiled", TILED.size(mask, replace(options, pattern=(n, m))), (n, m))


def forced(layout: str, linear: str, mask: NDArray[np.bool_], options: PackOptions) -> Choice:
    """The layout that `--layout` names; raises `UsageError` naming the linear whose mask it cannot store."""
    if layout in (*PATTERNED, "sliding") and mask.all():
        return Choice("dense", options, DENSE.size(mask, options), "nothing is pruned")
    if not LAYOUTS[layout].stores(VALUE_TYPES[options.value_type]):
        *others, last = [name for name in by_bits() if LAYOUTS[layout].stores(VALUE_TYPES[name])]
        raise UsageError(
            f"--layout {layout} stores {', '.join(others)} or {last} values, not {options.value_type}.",
            hint="Add --value-type i4, or use --layout auto.",
        )
    if layout == "nm":
        pattern = nm.find_pattern(mask)
        if pattern is None:
            raise UsageError(
                f"--layout nm cannot store {linear}: its mask keeps no fixed N of every M positions.",
                hint="Use --layout auto or bitmask, or compress with --pattern 2:4.",
                details={"tensor": linear},
            )
        options = replace(options, pattern=pattern)
    elif layout == "tiled":
        if not tiled.tolerates(mask, options):
            rows, columns = mask.shape
            raise UsageError(
                f"--layout tiled cannot store {linear} ({rows} x {columns}): it needs 1:4, 2:4 or N "
                "of every 16 positions, and multiples of 16 rows and columns.",
                hint="Use --layout auto, or compress with --pattern 2:4 or 6:16.",
                details={"tensor": linear},
            )
        options = replace(options, pattern=tiled.find_pattern(mask))
    elif layout == "sliding" and not sliding.tolerates(mask, options):
        rows, columns = mask.shape
        raise UsageError(
            f"--layout sliding cannot store {linear} ({rows} x {columns}): it needs one kept position in "
            "every window of 4, and multiples of 16 rows and columns.",
            hint="Use --layout auto, or compress with --pattern sliding.",
            details={"tensor": linear},
        )
    choice = Choice(layout, options, LAYOUTS[layout].size(mask, options), f"--layout {layout}")
    if layout == "bitmask":
        return replace(_shared(choice, mask, DENSE.size(mask, options)), reason=choice.reason)
    return choice


def _name(pattern: Pattern) -> str:
    return f"{pattern[0]}:{pattern[1]}"


def _share(size: int, dense_bytes: int) -> str:
    return f"{size / max(1, dense_bytes):.0%} of dense"
