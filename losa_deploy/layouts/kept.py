"""What all layouts do with values: kept weights become codes, and codes weights again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackedTensor, PackOptions, Unpacked
from losa_deploy.layouts.values import VALUE_TYPES, dequantize, quantize

TOGETHER = 4_000_000
"""Weights that are rounded or compared at once: both take up to 28 bytes for each."""


def kept_codes(
    weight: NDArray[np.float32], mask: NDArray[np.bool_], options: PackOptions
) -> tuple[NDArray[np.generic], dict[str, Component]]:
    """Weight and mask [out, in] → one code per position [out, in], 0 where pruned, and what codes mean.

    Raises `ValueError` for values that the type cannot hold; pruned ones may be anything.
    """
    parts = [
        quantize(np.where(mask[rows], weight[rows], np.float32(0)), _options_of(options, rows))
        for rows in row_slices(*weight.shape)
    ]
    codes = np.concatenate([codes for codes, _ in parts])
    meaning = dict(parts[0][1])
    if "scale" in meaning:
        meaning["scale"] = np.concatenate([found["scale"] for _, found in parts])
    return codes, meaning


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """All rows of a matrix, about `TOGETHER` weights at a time; at least one slice."""
    step = max(1, TOGETHER // max(1, columns))
    for start in range(0, max(1, rows), step):
        yield slice(start, start + step)


def _options_of(options: PackOptions, rows: slice) -> PackOptions:
    """The same for some rows."""
    return options if options.scales is None else replace(options, scales=options.scales[rows])


def packed_as(
    layout: str,
    mask: NDArray[np.bool_],
    options: PackOptions,
    arrays: Mapping[str, Component],
    **params: int,
) -> PackedTensor:
    """The packed tensor of a mask [out, in]; `params` are those of the layout."""
    of_type = VALUE_TYPES[options.value_type].params(options)
    shape = (mask.shape[0], mask.shape[1])
    return PackedTensor(layout, options.value_type, shape, {**params, **of_type}, arrays, int(mask.sum()))


def unpacked(
    packed: PackedTensor,
    codes: NDArray[np.generic],
    mask: NDArray[np.bool_],
    meaning: Mapping[str, Component] | None = None,
) -> Unpacked:
    """What codes [out, in] of a packed tensor mean; `meaning` where its scales are not stored by row."""
    arrays = packed.arrays if meaning is None else meaning
    weight = dequantize(codes, packed.value_type, packed.params, arrays)
    return Unpacked(np.where(mask, weight, np.float32(0)), mask)
