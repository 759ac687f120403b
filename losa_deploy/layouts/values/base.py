"""What a value type is: how single weights become codes and back, independent of the layout.

A value type is one class in one file, which registers itself. Everything that depends on the type of a
value asks it: the layouts how many bits a code takes, the blob which scales belong to it, a check how far
rounding may move a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from losa_deploy.layouts.base import Component, PackOptions

NO_SCALE, F32_SCALE, F16_SCALE = 0, 1, 2
"""Scale types as the header of a blob numbers them."""
GROUP_SIZES = (32, 64, 128)
"""Positions that may share a scale."""
SCALE_ERROR = 2.0**-11
"""Relative error of a scale that is stored as f16 (f32 is nearer) ..."""
SCALE_FLOOR = 2.0**-25
"""... and its absolute error where f16 is subnormal."""


class ValueType(ABC):
    """One way to store a weight: a code, and the components that give codes their meaning."""

    name: str
    """As in recipes, file names and operator names, e.g. `i4`."""
    number: int
    """In the header of a blob."""
    planes: tuple[int, ...]
    """Bits of a code; below 8 bits those of each plane, a power of two, lowest bits first."""
    code: np.dtype[np.generic]
    """Of one code before it is stored; code 0 decodes to zero."""
    level: np.dtype[np.generic]
    """Of what a code stands for before its scale is applied."""
    levels: tuple[int, int] | None = None
    """Lowest and highest level of a grid that this type stores exactly; None for floats."""
    scale_types: tuple[int, ...] = (NO_SCALE,)
    """What the scales may be stored as."""
    head: str
    """Value type of embedding and head beside blocks of this type."""
    ggml: str
    """Type of ggml whose tensors hold the same values."""
    rounding_kl: float
    """Largest mean divergence (nats per token) from the merged model that passes as rounding."""
    kernel_kl: float
    """Largest mean divergence that native kernels may add: a sound model moves by less than a tenth of it."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def grouped(self) -> bool:
        """True if groups of positions share a scale, and a table says what a code means."""
        return False

    @property
    def stored(self) -> np.dtype[np.generic]:
        """Of the `values` component: codes below 8 bits share bytes."""
        return np.dtype(np.uint8) if self.bits < 8 else self.code

    @abstractmethod
    def quantize(
        self, weight: NDArray[np.float32], options: PackOptions
    ) -> tuple[NDArray[np.generic], dict[str, Component]]:
        """Finite weight [out, in] → one code per position [out, in], and what gives codes their meaning.

        Of that `scale` is by row, and everything else the same for all rows: some rows of a weight get what
        they get as a part of it. Zero weights get code 0. Raises `ValueError` for values that the type
        cannot hold.
        """

    @abstractmethod
    def dequantize(
        self, codes: NDArray[np.generic], params: Mapping[str, int], arrays: Mapping[str, Component]
    ) -> NDArray[np.float32]:
        """Codes [out, in] → weight [out, in]: level times scale, one f32 product each."""

    @abstractmethod
    def error_bound(self, weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
        """Largest error [out, in] that rounding `weight` [out, in] to this type may cause."""

    def params(self, options: PackOptions) -> dict[str, int]:
        """Parameters that the type adds to a packed tensor."""
        del options
        return {}

    def scale_shape(self, shape: tuple[int, int], group_size: int) -> tuple[int, ...] | None:
        """Of the scales of a matrix (out, in); None if there are none."""
        del shape, group_size
        return None

    @property
    def table_size(self) -> int:
        """Levels of the `table` component, 0 if there is none."""
        return 0

    def meaning_bytes(self, shape: tuple[int, int], options: PackOptions) -> dict[str, int]:
        """Bytes of `scale` and `table` of a linear of `shape` (out, in), 0 for one that is not stored."""
        scales = self.scale_shape(shape, options.group_size)
        width = 4 if self.scale_type(options) == F32_SCALE else 2
        return {"scale": 0 if scales is None else int(np.prod(scales)) * width, "table": self.table_size}

    def scale_type(self, options: PackOptions) -> int:
        """What scales are stored as under these options."""
        del options
        return self.scale_types[0]

    def check(self, arrays: Mapping[str, Component]) -> None:
        """Raise `ValueError` if the components that give codes their meaning are not in the format."""
        del arrays


VALUE_TYPES: dict[str, ValueType] = {}
"""Every value type by name; filled where each is defined."""


def register(value_type: ValueType) -> ValueType:
    """Add a value type to `VALUE_TYPES`; called once at the end of the file that defines it."""
    VALUE_TYPES[value_type.name] = value_type
    return value_type


def by_number() -> list[ValueType]:
    """All value types in the order of their numbers."""
    return sorted(VALUE_TYPES.values(), key=lambda value_type: value_type.number)


def by_bits() -> list[str]:
    """Names of all value types, the widest first."""
    return sorted(VALUE_TYPES, key=lambda name: (-VALUE_TYPES[name].bits, name))


def divide(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """weight / scale, and 0 where the scale is 0 (or underflowed to it)."""
    out = np.zeros_like(weight)
    np.divide(weight, scale, out=out, where=np.broadcast_to(scale != 0, weight.shape))
    return out


def largest_of_groups(weight: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """[out, in] → the largest magnitude of each group of `width` positions, at each of its positions."""
    columns = weight.shape[1]
    largest = np.maximum.reduceat(np.abs(weight), np.arange(0, columns, width), axis=1)
    spread: NDArray[np.float32] = np.repeat(largest, width, axis=1)[:, :columns]
    return spread
