"""Packed tensors in the native kernels: what runtimes compute with, for tests and benchmarks."""

from __future__ import annotations

import numpy as np

from losa_deploy import _native
from losa_deploy.layouts import PackedTensor
from losa_deploy.layouts.base import COMPONENTS
from losa_deploy.layouts.blob import LAYOUT_IDS, VALUE_TYPE_IDS, scale_type_id


def open_tensor(packed: PackedTensor) -> _native.Tensor:
    """The tensor as the kernels see it; raises `RuntimeError` if its bytes break the format."""
    parts = [packed.arrays.get(name, np.zeros(0, np.uint8)) for name in COMPONENTS]
    return _native.Tensor(
        LAYOUT_IDS[packed.layout],
        VALUE_TYPE_IDS[packed.value_type],
        *packed.shape,
        scale_type_id(packed),
        packed.params.get("n", 0),
        packed.params.get("m", 0),
        packed.params.get("position_bits", 0),
        packed.params.get("group_size", 0),
        *(np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts),
    )
