"""Which layout a tensor gets: sparse only where that saves bytes (law 4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import UsageError
from losa_deploy.layouts import bitmask, dense, nm, tiled
from losa_deploy.layouts.base import LAYOUTS, PackOptions

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
    """The smallest layout for a mask [out, in]; ties go to the simpler one (dense, bitmask, nm).

    A mask that keeps N of 16 and follows no shorter pattern was made for tiles, and gets them if that is
    smaller than dense: they compute several times as fast. So does any mask for which tiles are not larger
    than nm.
    """
    dense_bytes = dense.size(mask, options)
    if mask.all():
        return Choice("dense", options, dense_bytes, "nothing is pruned")
    bitmask_bytes = bitmask.size(mask, options)
    pattern = nm.find_pattern(mask)
    if pattern is not None:
        patterned = replace(options, pattern=pattern)
        nm_bytes = nm.size(mask, patterned)
        tiles = _tiles(mask, options, pattern, nm_bytes)
        if tiles is not None and tiles.bytes < dense_bytes:
            return tiles
        if nm_bytes < min(bitmask_bytes, dense_bytes):
            name = f"{pattern[0]}:{pattern[1]}"
            reason = (
                f"{name} mask: {_share(nm_bytes, dense_bytes)}, bitmask {_share(bitmask_bytes, dense_bytes)}"
            )
            return Choice("nm", patterned, nm_bytes, reason)
    kept = f"{mask.mean():.0%} kept"
    reason = f"{kept}: bitmask takes {_share(bitmask_bytes, dense_bytes)}"
    if bitmask_bytes < dense_bytes:
        return Choice("bitmask", options, bitmask_bytes, reason)
    return Choice("dense", options, dense_bytes, reason)


def _tiles(
    mask: NDArray[np.bool_], options: PackOptions, pattern: tuple[int, int], nm_bytes: int
) -> Choice | None:
    if not tiled.tolerates(mask, options):
        return None
    found = replace(options, pattern=tiled.find_pattern(mask))
    size, dense_bytes = tiled.size(mask, found), dense.size(mask, options)
    if pattern[1] < tiled.M and size > nm_bytes:
        return None
    name = f"{pattern[0]}:{pattern[1]}"
    reason = (
        f"{name} mask in tiles: {_share(size, dense_bytes)}, nm {_share(nm_bytes, dense_bytes)} but slower"
    )
    return Choice("tiled", found, size, reason)


def forced(layout: str, linear: str, mask: NDArray[np.bool_], options: PackOptions) -> Choice:
    """The layout that `--layout` names; raises `UsageError` naming the linear whose mask it cannot store."""
    if layout in PATTERNED and mask.all():
        return Choice("dense", options, dense.size(mask, options), "nothing is pruned")
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
        if options.value_type not in ("i8", "i4"):
            raise UsageError(
                f"--layout tiled stores i8 or i4 values, not {options.value_type}.",
                hint="Add --value-type i4, or use --layout auto.",
            )
        if not tiled.tolerates(mask, options):
            rows, columns = mask.shape
            raise UsageError(
                f"--layout tiled cannot store {linear} ({rows} x {columns}): it needs N of every 16 "
                "positions, and multiples of 16 rows and columns.",
                hint="Use --layout auto, or compress with --pattern 6:16.",
                details={"tensor": linear},
            )
        options = replace(options, pattern=tiled.find_pattern(mask))
    return Choice(layout, options, LAYOUTS[layout].size(mask, options), f"--layout {layout}")


def _share(size: int, dense_bytes: int) -> str:
    return f"{size / max(1, dense_bytes):.0%} of dense"
