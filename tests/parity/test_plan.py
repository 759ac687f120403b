"""What is planned is what is written: every tensor of an export, and its files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.exporters.onnx.exporter import OnnxExporter, write_graph
from losa_deploy.exporters.onnx.graph import DenseGraph, dense_graph
from losa_deploy.exporters.onnx.plan import Job
from losa_deploy.interfaces import ExportPlan, PlannedTensor
from losa_deploy.manifest import TensorRecord
from losa_deploy.model import SparseModel
from losa_deploy.progress import no_progress
from losa_deploy.recipe import ExportRecipe

from .conftest import GATED, Make, with_masks

PAGE = 4096
GGUF_CLOSENESS = 50_000
"""Bytes: the header of a GGUF file with its tokenizer is estimated."""


def kept_of(kept: int, group: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    order = np.random.default_rng(shape[0]).random((shape[0], shape[1] // group, group)).argsort(axis=2)
    return (order < kept).reshape(shape)


@pytest.fixture(scope="module")
def patterned(make_merged: Make, tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """2:4 and 6:16 masks, and one linear of which nothing is pruned."""
    from transformers import LlamaConfig

    config = {**GATED, "num_hidden_layers": 1, "intermediate_size": 192}
    model = make_merged(LlamaConfig(**config, tie_word_embeddings=True))
    masks = {}
    for name, shape in model.linears.items():
        wide = name.endswith(("up_proj", "down_proj"))
        masks[name] = kept_of(6, 16, shape) if wide else kept_of(2, 4, shape)
        if name.endswith("v_proj"):
            masks[name][:] = True
    return with_masks(model, tmp_path_factory.mktemp("patterned") / "merged", masks)


@pytest.fixture(scope="module")
def mixed(patterned: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """The same without a pattern in two linears, in one of them with the same mask for pairs of rows."""
    masks = {name: patterned.mask(name) for name in patterned.linears}
    for name, mask in masks.items():
        if name.endswith(("q_proj", "gate_proj")):
            masks[name] = np.random.default_rng(7).random(mask.shape) < 0.4
        if name.endswith("gate_proj"):
            masks[name][1::2] = masks[name][::2]
    return with_masks(patterned, tmp_path_factory.mktemp("mixed") / "merged", masks)


@pytest.fixture(scope="module")
def graphs(
    patterned: SparseModel, mixed: SparseModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[Path, DenseGraph]]:
    """The graph of each model, made once."""
    place = tmp_path_factory.mktemp("graphs")
    (place / "patterned").mkdir()
    (place / "mixed").mkdir()
    with (
        dense_graph(patterned.checkpoint, place / "patterned") as one,
        dense_graph(mixed.checkpoint, place / "mixed") as other,
    ):
        yield {patterned.folder: one, mixed.folder: other}


def facts(tensor: PlannedTensor | TensorRecord) -> tuple[object, ...]:
    stored = (tensor.layout, tensor.value_type, tensor.nnz, tensor.bytes)
    return (tensor.name, tensor.shape, *stored, tensor.reason)


CASES = [
    ({"layout": layout, "value_type": value_type}, layouts)
    for layout, value_types, layouts in (
        ("auto", ("f32", "f16", "i8", "i4", "i3"), None),
        ("bitmask", ("f16", "i4", "i3"), {"bitmask"}),
        ("dense", ("f32", "i8", "i4", "i3"), {"dense"}),
        ("nm", ("f32", "i4", "i3"), {"nm", "dense"}),
        ("tiled", ("i8", "i4"), {"tiled", "dense"}),
    )
    for value_type in value_types
]
NAMES = [f"{recipe['layout']}-{recipe['value_type']}" for recipe, _ in CASES]


def model_for(recipe: Mapping[str, object], patterned: SparseModel, mixed: SparseModel) -> SparseModel:
    return patterned if recipe["layout"] in ("nm", "tiled") else mixed


def check(plan: ExportPlan, records: tuple[TensorRecord, ...], layouts: set[str] | None) -> None:
    """Layouts, value types, counts, bytes and reasons; `auto` has to have something to choose from."""
    assert [facts(tensor) for tensor in plan.tensors] == [facts(record) for record in records]
    linears = {tensor.layout for tensor in plan.tensors if tensor.name.endswith("_proj")}
    assert linears == layouts if layouts else len(linears) > 1


@pytest.mark.parametrize(("recipe", "layouts"), CASES, ids=NAMES)
def test_onnx(
    recipe: dict[str, object],
    layouts: set[str] | None,
    patterned: SparseModel,
    mixed: SparseModel,
    graphs: Mapping[Path, DenseGraph],
    tmp_path: Path,
) -> None:
    model = model_for(recipe, patterned, mixed)
    plan = OnnxExporter().plan(model, ExportRecipe.model_validate({**recipe, "group_size": 32}))
    kept = graphs[model.folder]
    graph = replace(kept, model=copy.deepcopy(kept.model))
    job = Job(model.checkpoint, plan.recipe, model.mask, model.grid)
    packing = write_graph(job, plan.tensors, graph, tmp_path, {}, no_progress)
    check(plan, (*packing.linears, *packing.others), layouts)
    sizes = {name: (tmp_path / name).stat().st_size for name in plan.files}
    assert abs(plan.files["model.onnx.data"] - sizes["model.onnx.data"]) < PAGE  # another tensor is the last
    assert plan.files["model.onnx"] == pytest.approx(sizes["model.onnx"], rel=0.01)
    assert all(plan.files[name] == size for name, size in sizes.items() if name.endswith(".json"))


def test_portable_onnx(mixed: SparseModel, graphs: Mapping[Path, DenseGraph], tmp_path: Path) -> None:
    kept = graphs[mixed.folder]
    plan = OnnxExporter().plan(mixed, ExportRecipe(portable=True))
    job = Job(mixed.checkpoint, plan.recipe, mixed.mask, mixed.grid)
    graph = replace(kept, model=copy.deepcopy(kept.model))
    packing = write_graph(job, plan.tensors, graph, tmp_path, {}, no_progress)
    check(plan, (*packing.linears, *packing.others), {"dense"})
    assert {tensor.value_type for tensor in plan.tensors} == {"f32"}


@pytest.mark.parametrize("forms", [{"packed": True}, {"packed": True, "portable": True}, {}])
@pytest.mark.parametrize(("recipe", "layouts"), CASES, ids=NAMES)
def test_gguf(
    recipe: dict[str, object],
    layouts: set[str] | None,
    forms: dict[str, bool],
    patterned: SparseModel,
    mixed: SparseModel,
    tmp_path: Path,
) -> None:
    if not forms and recipe["layout"] not in ("auto", "dense"):
        pytest.skip("a portable file has no layouts")
    model, exporter = model_for(recipe, patterned, mixed), GgufExporter()
    plan = exporter.plan(model, ExportRecipe.model_validate({**recipe, **forms, "group_size": 32}))
    exported = exporter.export(model, plan, tmp_path, no_progress)
    check(plan, exported.tensors, layouts if forms else {"dense"})
    assert set(plan.files) == {path.name for path in tmp_path.glob("*.gguf")}
    for name, size in plan.files.items():
        assert abs(size - (tmp_path / name).stat().st_size) < GGUF_CLOSENESS


def _mask_of(model: SparseModel, name: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    mask = model.mask(name)
    assert mask.shape == shape
    return mask


def test_estimates_follow_the_rules_of_plans(mixed: SparseModel) -> None:
    """With the real masks at hand an estimate is the plan, but for rows that a GGUF file reorders."""
    rows, columns = mixed.checkpoint.shape(f"{mixed.family.embedding}.weight")
    others = {mixed.family.embedding: (rows, columns)}
    for exporter, recipes in (
        (OnnxExporter(), ({}, {"portable": True}, {"layout": "dense", "head": "i4"})),
        (GgufExporter(), ({}, {"packed": True}, {"packed": True, "portable": True, "value_type": "i8"})),
    ):
        for choices in recipes:
            recipe = ExportRecipe.model_validate({**choices, "group_size": 32})
            plan = exporter.plan(mixed, recipe)
            expected = {tensor.name: tensor for tensor in plan.tensors}
            for name, shape in mixed.linears.items():
                mask = partial(_mask_of, mixed, name)
                files = exporter.estimate({name: shape}, others, recipe, mask)
                assert len(files) == 1 + bool(recipe.packed and recipe.portable)
                first = next(iter(files.values()))
                assert [tensor.name for tensor in first] == [t for t in expected if t in {name, *others}]
                for found in first:
                    planned = expected[found.name]
                    assert facts(replace(found, bytes=0)) == facts(replace(planned, bytes=0))
                    assert found.bytes == pytest.approx(planned.bytes, rel=0.02 * recipe.packed)


def test_estimates_plan_one_linear_of_each_shape(mixed: SparseModel) -> None:
    """Thousands of linears of a large model have a handful of shapes, and masks to be have no other facts."""
    asked: list[tuple[int, int]] = []

    def mask(shape: tuple[int, int]) -> NDArray[np.bool_]:
        asked.append(shape)
        return kept_of(2, 4, shape)

    linears = {f"{part}.{name}": shape for part in "ab" for name, shape in mixed.linears.items()}
    for exporter in (OnnxExporter(), GgufExporter()):
        asked.clear()
        files = exporter.estimate(linears, {}, ExportRecipe(), mask)
        assert sorted(asked) == sorted(set(linears.values()))
        assert {tensor.name: tensor.shape for tensor in next(iter(files.values()))} == linears
