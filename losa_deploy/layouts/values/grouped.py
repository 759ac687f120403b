"""Codes of a few bits: a table of levels per tensor, and a scale per group of positions of a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions
from losa_deploy.layouts.values.base import (
    F16_SCALE,
    SCALE_ERROR,
    SCALE_FLOOR,
    ValueType,
    divide,
    largest_of_groups,
)

SMALLER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Scales that `search` tries, relative to the one at which the largest weight of a group is exact."""


def group_count(in_features: int, group_size: int) -> int:
    """Scales per row; the last group may be short."""
    return -(-in_features // group_size)


class Grouped(ValueType):
    """The nearest level of the table; the group's largest weight sets a signed scale, and is nearly exact."""

    code = np.dtype(np.uint8)
    level = np.dtype(np.int8)
    levels: tuple[int, int]
    scale_types = (F16_SCALE,)
    head = "i8"
    rounding_kl = 1.0
    """Rounding to few levels is a matter of quality, which the report states; beyond this it is broken."""
    kernel_kl = 0.05

    @property
    def grouped(self) -> bool:
        return True

    @property
    def table_size(self) -> int:
        """Of the component: a register of 16 levels, however few codes there are."""
        return 16

    @property
    def linear_table(self) -> tuple[int, ...]:
        """The default table: a code is the level as a two's complement number."""
        count = 1 << self.bits
        return tuple(code if code < count // 2 else code - count for code in range(count))

    def params(self, options: PackOptions) -> dict[str, int]:
        return {"group_size": options.group_size}

    def scale_shape(self, shape: tuple[int, int], group_size: int) -> tuple[int, ...]:
        return shape[0], group_count(shape[1], group_size)

    def quantize(
        self, weight: NDArray[np.float32], options: PackOptions
    ) -> tuple[NDArray[np.generic], dict[str, Component]]:
        table = self._table(options)
        out_features, in_features = weight.shape
        size, groups = options.group_size, group_count(in_features, options.group_size)
        padded = np.zeros((out_features, groups * size), np.float32)
        padded[:, :in_features] = weight
        grouped = padded.reshape(out_features, groups, size)
        index = np.abs(grouped).argmax(axis=2)[..., None]
        peak = np.take_along_axis(grouped, index, axis=2)[..., 0]
        widest = table[np.abs(table.astype(np.int16)).argmax()]
        scale = (peak / np.float32(widest)).astype(np.float16)
        if options.scales is not None:
            scale = options.scales.astype(np.float16)
        elif options.search:
            scale = self._searched(grouped, scale, table)
        if not np.isfinite(scale).all():
            raise ValueError(f"a group of magnitude {np.abs(peak).max():g} has a scale that does not fit f16")
        levels = divide(weight, spread(scale.astype(np.float32), size, in_features))
        stored = np.zeros(self.table_size, np.int8)
        stored[: len(table)] = table
        return self._nearest(levels, table), {"scale": scale, "table": stored}

    def dequantize(
        self, codes: NDArray[np.generic], params: Mapping[str, int], arrays: Mapping[str, Component]
    ) -> NDArray[np.float32]:
        scale: NDArray[np.float32] = arrays["scale"].astype(np.float32)
        levels: NDArray[np.float32] = arrays["table"].astype(np.float32)[codes]
        # Level 0 times a negative scale is -0; zero is stored as +0.
        product: NDArray[np.float32] = levels * spread(
            scale, params["group_size"], codes.shape[1]
        ) + np.float32(0)
        return product

    def error_bound(self, weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
        """Half of the largest step, or what lies beyond the highest level of the smallest scale tried.

        The scale is (largest) / (lowest level) or one of `SMALLER`; its rounding counts once per level.
        """
        lowest, highest = self.levels
        step = largest_of_groups(weight, group_size) / np.float32(-lowest)
        beyond = np.abs(weight) - highest * np.float32(min(SMALLER)) * step
        rounding = np.maximum(0.5 * step, beyond)
        bound = rounding * (1 + SCALE_ERROR) - lowest * (step * SCALE_ERROR + SCALE_FLOOR)
        rounded: NDArray[np.float32] = bound.astype(np.float32)
        return rounded

    def check(self, arrays: Mapping[str, Component]) -> None:
        table = arrays.get("table")
        if table is None:
            return  # its size is wrong, which is said elsewhere
        if table[0] != 0 or (table == -128).any():
            raise ValueError(f"the {self.name} table needs level 0 at code 0 and no level -128")
        if table[1 << self.bits :].any():
            raise ValueError(f"the {self.name} table has levels for codes that do not exist")

    def _table(self, options: PackOptions) -> NDArray[np.int8]:
        chosen = self.linear_table if options.table is None else options.table
        table = np.array(chosen, np.int8)
        if table.shape != (1 << self.bits,) or table[0] != 0:
            raise ValueError(
                f"the {self.name} table needs {1 << self.bits} levels with level 0 at code 0, found {chosen}"
            )
        return table

    def _searched(
        self, grouped: NDArray[np.float32], scale: NDArray[np.float16], table: NDArray[np.int8]
    ) -> NDArray[np.float16]:
        """The scale [out, groups] of the least squared error, of those that are `SMALLER` than `scale`."""
        best, least = scale, np.full(scale.shape, np.inf, np.float32)
        for factor in SMALLER:
            found = (scale.astype(np.float32) * np.float32(factor)).astype(np.float16)
            wide = found.astype(np.float32)[..., None]
            levels = divide(grouped, wide).reshape(len(grouped), -1)
            codes = self._nearest(levels, table).reshape(grouped.shape)
            error = np.square(table.astype(np.float32)[codes] * wide - grouped).sum(axis=2)
            best, least = np.where(error < least, found, best), np.minimum(error, least)
        return best.astype(np.float16)

    def _nearest(self, levels: NDArray[np.float32], table: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Code of the nearest level for each real one; a tie goes to the lower level, zero to code 0."""
        if tuple(table.tolist()) == self.linear_table:
            nearest = np.clip(np.rint(levels), *self.levels).astype(np.int8)
            return nearest.astype(np.uint8) & np.uint8((1 << self.bits) - 1)
        order = np.argsort(table, kind="stable")
        ranked = table[order].astype(np.float32)
        index = np.searchsorted((ranked[1:] + ranked[:-1]) / 2, levels, side="left")
        codes = order[index].astype(np.uint8)
        return np.where(levels == 0, np.uint8(0), codes)


def spread(scale: NDArray[np.float32], group_size: int, in_features: int) -> NDArray[np.float32]:
    """Group scales [out, groups] → one per position [out, in]."""
    return np.repeat(scale, group_size, axis=1)[:, :in_features]
