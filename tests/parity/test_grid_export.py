"""Weights that were trained on a grid are exported bit for bit, in every format and group size that fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from losa_deploy.cli.bench_row import grid_bits
from losa_deploy.compress.grid import GridKind, rounded, search_scales
from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.layouts import PackOptions
from losa_deploy.layouts.values import VALUE_TYPES, dequantize, quantize
from losa_deploy.manifest import TensorRecord
from losa_deploy.model import GRID_FILE, GRID_KEY, SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import write_weights
from losa_deploy.verify.stored import check_decoded, check_grid

from .conftest import export_as, with_masks


def on_grid(model: SparseModel, folder: Path, kind: GridKind, dtype: torch.dtype) -> SparseModel:
    """The model with every linear on a grid of its own, stored in `dtype`, with `grid.safetensors`."""
    shutil.copytree(model.folder, folder)
    tensors = {name: model.checkpoint.tensor(name) for name in model.checkpoint.files}
    scales: dict[str, torch.Tensor] = {}
    for name in model.linears:
        weight = tensors[f"{name}.weight"].float()
        found = search_scales(weight, kind) * 0.9  # not what an export would find by itself
        scales[name] = found.half()
        tensors[f"{name}.weight"] = rounded(weight, scales[name].float(), kind).to(dtype)
    write_weights(folder, tensors.items())
    kinds = {name: [kind.value_type, kind.group_size] for name in scales}
    save_file(scales, folder / GRID_FILE, metadata={"format": "pt", GRID_KEY: json.dumps(kinds)})
    return SparseModel.open(folder)


def in_pairs(model: SparseModel, folder: Path) -> SparseModel:
    """The model with masks that rows share in pairs: those of the even rows."""
    shared = {name: model.mask(name)[: rows // 2 * 2 : 2] for name, (rows, _) in model.linears.items()}
    return with_masks(model, folder, {name: np.repeat(mask, 2, axis=0) for name, mask in shared.items()})


def trained(model: SparseModel, name: str) -> np.ndarray:
    grid = model.grid(name)
    assert grid is not None
    return grid.values(model.weight(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "value_type", "group_size"),
    [
        (GridKind("i4", 128), "i4", 128),
        (GridKind("i4", 128), "i4", 32),
        (GridKind("i3", 64), "i4", 64),
        (GridKind("i3", 64), "i3", 32),
        (GridKind("i8", 0), "i8", 128),
    ],
    ids=str,
)
def test_exports_hold_exactly_the_trained_values(
    kind: GridKind,
    value_type: str,
    group_size: int,
    dtype: torch.dtype,
    merged_llama: SparseModel,
    tmp_path: Path,
) -> None:
    model = on_grid(merged_llama, tmp_path / "merged", kind, dtype)
    recipe = ExportRecipe.model_validate({"value_type": value_type, "group_size": group_size})
    packed = recipe.model_copy(update={"packed": True, "portable": True})
    for exporter, chosen in ((OnnxExporter(), recipe), (GgufExporter(), packed)):
        folder = tmp_path / exporter.name
        folder.mkdir()
        stored = export_as(exporter, model, chosen, folder).tensors
        layouts = {tensor.layout for tensor in stored if tensor.name in model.linears}
        assert layouts <= {"bitmask", "nm"}  # half of each row is pruned
        decoded = exporter.decode(folder)
        beside = exporter.decode_beside(folder)
        for name in model.linears:
            expected = trained(model, name)
            assert np.array_equal(decoded[name].view(np.uint32), expected.view(np.uint32)), name
            if beside is not None and expected.shape[1] % 32 == 0:  # other rows are F16 there
                assert np.array_equal(beside.weights[name], expected), name


@pytest.mark.parametrize(("value_type", "group_size"), [("i4", 32), ("i3", 64), ("i8", 0)])
def test_exports_of_rows_that_share_masks_hold_exactly_the_trained_values(
    value_type: str, group_size: int, merged_llama: SparseModel, tmp_path: Path
) -> None:
    kind = GridKind(value_type, group_size)  # type: ignore[arg-type]
    model = on_grid(in_pairs(merged_llama, tmp_path / "pairs"), tmp_path / "merged", kind, torch.float32)
    recipe = ExportRecipe.model_validate({"value_type": value_type, "group_size": group_size or 128})
    packed = recipe.model_copy(update={"packed": True})
    for exporter, chosen in ((OnnxExporter(), recipe), (GgufExporter(), packed)):
        folder = tmp_path / exporter.name
        folder.mkdir()
        stored = export_as(exporter, model, chosen, folder).tensors
        assert sum("pairs of rows" in tensor.reason for tensor in stored) >= 5
        decoded = exporter.decode(folder)
        for name in model.linears:
            assert np.array_equal(decoded[name].view(np.uint32), trained(model, name).view(np.uint32)), name


def test_values_off_the_trained_ones_are_found(merged_llama: SparseModel, tmp_path: Path) -> None:
    model = on_grid(merged_llama, tmp_path / "merged", GridKind("i4", 128), torch.float32)
    name = next(iter(model.linears))
    weight, mask, grid = model.weight(name), model.mask(name), model.grid(name)
    assert grid is not None and not check_grid(name, weight, grid)
    record = TensorRecord(
        name=name, shape=weight.shape, layout="bitmask", value_type="i4", nnz=int(mask.sum()), bytes=1,
        bits_per_weight=1.0, sha256="",
    )  # fmt: skip
    assert check_decoded(record, weight, weight, mask, 128, grid) == ([], 0.0)
    row, column = map(int, np.argwhere(weight)[0])
    other = weight.copy()
    other[row, column] = np.nextafter(weight[row, column], np.float32(9))
    found, _ = check_decoded(record, other, weight, mask, 128, grid)
    assert "1 weights that are not the trained ones" in found[0]
    off = weight.copy()
    off[row, column] *= 1.1
    assert "1 weights off the grid" in check_grid(name, off, grid)[0]


def test_another_value_type_finds_scales_of_its_own(merged_llama: SparseModel, tmp_path: Path) -> None:
    model = on_grid(merged_llama, tmp_path / "merged", GridKind("i4", 64), torch.float32)
    grid = model.grid(next(iter(model.linears)))
    assert grid is not None
    assert grid.fitted(PackOptions("i8"), 64).scales is None
    assert grid.fitted(PackOptions("i4", 128), 64).scales is None
    assert grid.fitted(PackOptions("i4", 64), 64).scales is not None


def test_a_search_lowers_the_error_of_i4(merged_llama: SparseModel) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((16, 200)) ** 3).astype(np.float32)
    errors = []
    for search in (False, True):
        options = PackOptions("i4", 64, search=search)
        codes, parts = quantize(weight, options)
        value = dequantize(codes, "i4", VALUE_TYPES[options.value_type].params(options), parts)
        errors.append(float(np.square(value - weight).sum()))
    assert errors[1] < 0.97 * errors[0]


def test_a_grid_file_of_nothing_is_refused_not_trusted(merged_llama: SparseModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(merged_llama.folder, tmp_path / "merged"))
    (folder / GRID_FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"grid\.safetensors"):
        SparseModel.open(folder).grid(next(iter(merged_llama.linears)))


def test_the_bits_of_a_trained_grid_count_levels_scales_and_positions(
    merged_llama: SparseModel, tmp_path: Path
) -> None:
    """Half of the weights in 3 bits, one bit per position, a scale per started group of 64."""
    assert grid_bits(merged_llama) is None, "weights on no grid"
    model = on_grid(merged_llama, tmp_path / "merged", GridKind("i3", 64), torch.float32)
    shapes = model.linears.values()
    weights = sum(rows * columns for rows, columns in shapes)
    scales = sum(rows * -(-columns // 64) for rows, columns in shapes)
    kept = sum(int(model.mask(name).sum()) for name in model.linears)
    assert 0 < kept < weights
    assert grid_bits(model) == pytest.approx((3 * kept + weights + 16 * scales) / weights)
