"""Which layout a tensor gets: sparse only where that saves bytes (law 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import UsageError
from losa_deploy.layouts import nm, tiled
from losa_deploy.layouts.base import LAYOUTS, PackOptions
from losa_deploy.layouts.bitmask import BITMASK
from losa_deploy.layouts.dense import DENSE
from losa_deploy.layouts.nm import NM
from losa_deploy.layouts.tiled import TILED
from losa_deploy.layouts.values import VALUE_TYPES, by_number

PATTERNED = ("nm", "tiled")
"""Layouts that need a fixed N of every M."""


@dataclass(frozen=True)
class Choice:
    """A layout, the options to pack with (the pattern filled in), its bytes, and why."""

    layout: str
    options: PackOptions
    bytes: int
    reason: str


def choose(mask: NDArray[np.bool_], options: PackOptions) -> Choice:
    """The smallest layout for a mask [out, in]; on a tie dense, or the sparse one that computes fastest.

    A mask that keeps N of 16 and follows no shorter pattern was made for tiles, and gets them if that is
    smaller than dense: they compute several times as fast.
    """
    dense_bytes = DENSE.size(mask, options)
    if mask.all():
        return Choice("dense", options, dense_bytes, "nothing is pruned")
    if not BITMASK.stores(VALUE_TYPES[options.value_type]):
        return _dense_or_tiled(mask, options)
    bitmask_bytes = BITMASK.size(mask, options)
    reason = f"{mask.mean():.0%} kept: bitmask takes {_share(bitmask_bytes, dense_bytes)}"
    best = Choice("bitmask", options, bitmask_bytes, reason)
    pattern = nm.find_pattern(mask)
    if pattern is not None:
        best = _patterned(mask, options, pattern, best)
    if best.bytes < dense_bytes:
        return best
    return Choice("dense", options, dense_bytes, reason)


def _patterned(
    mask: NDArray[np.bool_], options: PackOptions, pattern: tuple[int, int], best: Choice
) -> Choice:
    """The layout for the smallest pattern of a mask, or `best`, the bitmask."""
    name, dense_bytes, bitmask_bytes = f"{pattern[0]}:{pattern[1]}", DENSE.size(mask, options), best.bytes
    with_pattern = replace(options, pattern=pattern)
    nm_bytes = NM.size(mask, with_pattern)
    whole_bytes = 8 % pattern[1] == 0  # every mask byte keeps the same count: no kernel counts bits
    if nm_bytes < best.bytes or (nm_bytes == best.bytes and whole_bytes):
        compared = f"bitmask {_share(bitmask_bytes, dense_bytes)}"
        reason = f"{name} mask: {_share(nm_bytes, dense_bytes)}, {compared}"
        best = Choice("nm", with_pattern, nm_bytes, reason)
    if tiled.tolerates(mask, options):
        with_pattern = replace(options, pattern=tiled.find_pattern(mask))
        size = TILED.size(mask, with_pattern)
        if size <= best.bytes or (pattern[1] == tiled.WIDE and size < dense_bytes):
            compared = f"{best.layout} {_share(best.bytes, dense_bytes)} but slower"
            reason = f"{name} mask in tiles: {_share(size, dense_bytes)}, {compared}"
            best = Choice("tiled", with_pattern, size, reason)
    return best


def _dense_or_tiled(mask: NDArray[np.bool_], options: PackOptions) -> Choice:
    """The layout for a value type that is not stored as a stream of kept values."""
    size, kept = DENSE.size(mask, options), f"{mask.mean():.0%} kept"
    if not tiled.tolerates(mask, options):
        reason = f"{kept}: {options.value_type} is stored sparse in tiles of N:M only"
        return Choice("dense", options, size, reason)
    with_pattern = replace(options, pattern=tiled.find_pattern(mask))
    tiles = TILED.size(mask, with_pattern)
    reason = f"{kept}: tiles take {_share(tiles, size)}"
    return (
        Choice("tiled", with_pattern, tiles, reason)
        if tiles < size
        else Choice("dense", options, size, reason)
    )


def forced(layout: str, linear: str, mask: NDArray[np.bool_], options: PackOptions) -> Choice:
    """The layout that `--layout` names; raises `UsageError` naming the linear whose mask it cannot store."""
    if layout in PATTERNED and mask.all():
        return Choice("dense", options, DENSE.size(mask, options), "nothing is pruned")
    if not LAYOUTS[layout].stores(VALUE_TYPES[options.value_type]):
        *others, last = [kind.name for kind in by_number() if LAYOUTS[layout].stores(kind)]
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
    return Choice(layout, options, LAYOUTS[layout].size(mask, options), f"--layout {layout}")


def _share(size: int, dense_bytes: int) -> str:
    return f"{size / max(1, dense_bytes):.0%} of dense"
