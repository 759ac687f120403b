"""The codecs of ggml's types against those of the `gguf` package, and files with types that are not ours."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.errors import InputError
from losa_deploy.gguf.dense import VALUE_TYPES, is_narrower, stock_type
from losa_deploy.gguf.file import open_any, open_gguf
from losa_deploy.gguf.types import F16, F32, Q1_0, Q4_0, Q8_0, TYPES, GgmlType, WeightType, any_type, own_type

ROWS, COLUMNS = 5, 96


@pytest.mark.parametrize("kind", [*TYPES.values(), Q1_0], ids=lambda kind: kind.name)
def test_numbers_names_and_sizes_are_ggmls(kind: GgmlType) -> None:
    known = GGMLQuantizationType[kind.name]
    assert (kind.id, kind.weights, kind.block_bytes) == (known.value, *GGML_QUANT_SIZES[known])


@pytest.mark.parametrize(
    ("kind", "lowest", "highest"), [(F32, -9, 9), (F16, -9, 9), (Q8_0, -128, 127), (Q4_0, -8, 7)]
)
@pytest.mark.parametrize("per_row", [False, True])
def test_encoded_values_mean_what_gguf_reads(
    kind: WeightType, lowest: int, highest: int, per_row: bool
) -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(lowest, highest + 1, (ROWS, COLUMNS)).astype(np.int8)
    scales, expected = None, levels.astype(np.float32)
    if kind.weights > 1:
        shape = (ROWS, 1) if per_row else (ROWS, COLUMNS // kind.weights)
        scales = rng.standard_normal(shape).astype(np.float16)
        expected *= np.repeat(scales.astype(np.float32), COLUMNS // shape[1], axis=1)
    data = kind.encode(levels, scales)
    assert data.shape == (ROWS, kind.nbytes(COLUMNS)) and kind.fits(COLUMNS)
    decoded = kind.decode(data.tobytes())
    assert np.array_equal(decoded.reshape(ROWS, COLUMNS), expected)
    assert np.array_equal(decoded, dequantize(data, GGMLQuantizationType(kind.id)).reshape(-1))
    if kind is Q4_0:
        assert not np.signbit(decoded[decoded == 0]).any()


@pytest.mark.parametrize("level", [-9, 8])
def test_levels_that_do_not_fit_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match="levels from -8 to 7"):
        Q4_0.encode(np.full((1, 32), level, np.int8), np.ones((1, 1), np.float16))


def test_only_our_types_are_ours() -> None:
    assert {kind.id for kind in VALUE_TYPES} < set(TYPES)
    assert own_type(8) is any_type(8) is Q8_0
    for number in (Q1_0.id, GGMLQuantizationType.Q6_K):
        with pytest.raises(ValueError, match=r"type \d+, expected one of F32, F16, I8, Q4_0, Q8_0"):
            own_type(number)
    assert any_type(GGMLQuantizationType.Q6_K) == GgmlType(14, "Q6_K", 256, 210)
    with pytest.raises(ValueError, match="type 9999, which ggml does not have"):
        any_type(9999)


def test_tensors_of_any_type_are_placed_as_gguf_places_them(tmp_path: Path) -> None:
    geometry = GEOMETRIES["tiny"]
    ggufs.build_peer(geometry, "q4_k_m", tmp_path / "tiny-q4_k_m", seed=0, threads=1)
    path = tmp_path / "tiny-q4_k_m" / "model.gguf"
    expected = [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in GGUFReader(path).tensors
    ]
    with open_any(path) as file:
        found = [(t.name, t.dims, t.type.name, t.offset, t.bytes) for t in file.tensors]
        assert all(t.type.nbytes(prod(t.dims)) == t.bytes for t in file.tensors)
    assert found == expected
    assert not {name for *_, name, _, _ in found} <= {kind.name for kind in TYPES.values()}
    with pytest.raises(InputError, match="expected one of F32"), open_gguf(path):
        pass
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match="should lie at"), open_any(path):
        pass


@pytest.mark.parametrize(
    ("value_type", "name", "narrower"),
    [
        ("f32", "F32", False),
        ("f16", "F16", False),
        ("i8", "Q8_0", False),
        ("i4", "Q4_0", False),
        ("i3", "Q4_0", True),
    ],
)
def test_value_types_have_types_of_ggml(value_type: str, name: str, narrower: bool) -> None:
    assert (stock_type(value_type).name, is_narrower(value_type)) == (name, narrower)
    assert (VALUE_TYPES[stock_type(value_type)] == value_type) is not narrower
