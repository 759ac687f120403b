"""The native mask count against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from losa_deploy._native import kernels_version, mask_count
from losa_deploy.model import pack_mask


@given(st.binary(max_size=257))
def test_counts_the_set_bits_of_any_bytes(data: bytes) -> None:
    mask = np.frombuffer(data, np.uint8)
    assert mask_count(mask) == int(np.unpackbits(mask).sum())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 172), (63, 129)])
def test_counts_the_kept_positions_of_a_packed_mask(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.37
    assert mask_count(pack_mask(mask)) == int(mask.sum())


def test_a_matrix_is_refused_and_a_strided_row_is_read_right() -> None:
    with pytest.raises(TypeError):
        mask_count(np.zeros((2, 2), np.uint8))
    assert mask_count(np.array([255, 0, 1, 0], np.uint8)[::2]) == 9


def test_the_interface_has_a_version() -> None:
    assert kernels_version() == 1
