"""An export that is not what was planned is refused, whoever wrote the exporter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from losa_deploy.errors import EXIT_BUG, LosaError
from losa_deploy.interfaces import ExportedModel, ExportPlan, PlannedTensor
from losa_deploy.manifest import TensorRecord
from losa_deploy.planned import check_written, each_shape_once
from losa_deploy.recipe import ExportRecipe

TENSOR = PlannedTensor("a.q_proj", (4, 8), "nm", "i8", 16, 24, "2:4 mask", (2, 4))
RECORD = TensorRecord(
    name="a.q_proj",
    shape=(4, 8),
    layout="nm",
    value_type="i8",
    nnz=16,
    bytes=24,
    bits_per_weight=6.0,
    sha256="",
)
PLAN = ExportPlan("acme", ExportRecipe(), {"model.bin": 100}, (TENSOR,), 0)
WRITTEN = ExportedModel(Path(), "acme", {"model.bin": 90, "config.json": 5}, (RECORD,))


def test_what_was_planned_passes() -> None:
    check_written(PLAN, WRITTEN)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"layout": "bitmask"}, "bitmask i8 4x8 with 16 values in 24 bytes"),
        ({"bytes": 25}, "in 25 bytes"),
        ({"value_type": "i4"}, "nm i4"),
        ({"nnz": 15}, "with 15 values"),
        ({"shape": (8, 4)}, "8x4"),
    ],
)
def test_another_tensor_is_a_bug_that_names_it(change: dict[str, object], found: str) -> None:
    written = replace(WRITTEN, tensors=(RECORD.model_copy(update=change),))
    with pytest.raises(LosaError, match=r"acme did not write what it planned: a\.q_proj: found") as caught:
        check_written(PLAN, written)
    assert found in caught.value.message and caught.value.exit_code == EXIT_BUG
    assert caught.value.details == {"tensor": "a.q_proj"}


def test_missing_and_unplanned_tensors_and_files_are_bugs() -> None:
    with pytest.raises(LosaError, match=r"a\.q_proj: found nothing"):
        check_written(PLAN, replace(WRITTEN, tensors=()))
    with pytest.raises(LosaError, match="expected nothing"):
        check_written(replace(PLAN, tensors=()), WRITTEN)
    with pytest.raises(LosaError, match=r"model\.bin: found no such file"):
        check_written(PLAN, replace(WRITTEN, files={"config.json": 5}))


def test_tensors_of_one_shape_are_planned_once() -> None:
    asked: list[str] = []

    def make(name: str, shape: tuple[int, int]) -> PlannedTensor:
        asked.append(name)
        return replace(TENSOR, name=name, shape=shape)

    shapes = {"a.q_proj": (4, 8), "a.k_proj": (2, 8), "b.q_proj": (4, 8)}
    found = {tensor.name: tensor.shape for tensor in each_shape_once(shapes, make)}
    assert found == shapes
    assert asked == ["a.q_proj", "a.k_proj"]
