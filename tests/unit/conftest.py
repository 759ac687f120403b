"""A merged folder of the tiny model, and the smallest artifact format there can be, for unit tests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.interfaces import ExportedModel, Exporter, ExportPlan, MaskOf, PlannedTensor, Shapes
from losa_deploy.manifest import Manifest, MergeProof, SourceRecord, TensorRecord, hash_files
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe, Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files, write_weights


def dense_record(name: str, mask: NDArray[np.bool_]) -> TensorRecord:
    """How a linear is stored in a Hugging Face folder: dense f32."""
    return TensorRecord(
        name=name,
        shape=mask.shape,
        layout="dense",
        value_type="f32",
        nnz=int(mask.sum()),
        bytes=mask.size * 4,
        bits_per_weight=32.0,
        sha256="0" * 64,
    )


def write_merged(source: Path, folder: Path, recipe: Recipe, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    """A merged folder of the model in `source` under the given masks, without adaptation."""
    import torch
    from safetensors.torch import save_file

    checkpoint = Checkpoint.open(source)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.files}
    for name, mask in masks.items():
        tensors[f"{name}.weight"] = torch.where(torch.from_numpy(mask), tensors[f"{name}.weight"], 0.0)
    write_weights(folder, tensors.items())
    save_file({n: torch.from_numpy(pack_mask(m)) for n, m in masks.items()}, folder / MASK_FILE)
    copy_side_files(source, folder)
    kept, positions = sum(int(m.sum()) for m in masks.values()), sum(m.size for m in masks.values())
    Manifest(
        kind="merged",
        source=SourceRecord(id="someone/tiny", license="apache-2.0", files={"model.safetensors": "ab" * 32}),
        recipe=recipe,
        sparsity_achieved=1 - kept / positions,
        block_sparsity=(0.5,) * checkpoint.block_count,
        block_error=tuple(0.1 * (i + 1) for i in range(checkpoint.block_count)),
        linears=tuple(dense_record(n, masks[n]) for n in checkpoint.linears),
        merge_proof=MergeProof(
            ok=True,
            support_equal=True,
            max_abs_logit_difference=0.0,
            logit_tolerance=1e-4,
            cast_logit_difference=0.0,
            cast_error=0.0,
            kept_zeros=0,
        ),
        files=hash_files(folder),
    ).write(folder)


@pytest.fixture(scope="session")
def merged_half(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the smaller half of every group of 32 neighbours pruned (16:32)."""
    folder = tmp_path_factory.mktemp("merged_half")
    checkpoint = Checkpoint.open(tiny_llama)
    masks = {}
    for name, (rows, columns) in checkpoint.linears.items():
        weight = np.abs(checkpoint.array(f"{name}.weight")).reshape(rows, columns // 32, 32)
        rank = weight.argsort(-1).argsort(-1)
        masks[name] = (rank >= 16).reshape(rows, columns)
    write_merged(tiny_llama, folder, load_recipe(overrides=[("sparsity.pattern", "16:32")]), masks)
    return folder


class FolderExporter(Exporter):
    """The smallest format: the merged Hugging Face folder itself, opened by the reference runtime."""

    name = "folder"
    runtime = "reference"

    def estimate(
        self, linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
    ) -> Mapping[str, tuple[PlannedTensor, ...]]:
        return {"model.safetensors": ()}

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        pass

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        return ExportPlan("folder", recipe, {}, (), 0)

    def export(self, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress) -> ExportedModel:
        copy_side_files(model.folder, folder)
        for path in model.folder.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)
        update = {"kind": "exported", "format": "folder", "files": hash_files(folder)}
        model.manifest.model_copy(update=update).write(folder)
        return ExportedModel(folder, "folder", {}, ())

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        copy_side_files(source.folder, folder)
        for path in source.folder.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)
        return ExportedModel(folder, "folder", {}, ())

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        checkpoint = Checkpoint.open(folder)
        return {name: checkpoint.array(f"{name}.weight") for name in checkpoint.linears}


@pytest.fixture(scope="session")
def folder_exporter() -> FolderExporter:
    """An exporter of the smallest format."""
    return FolderExporter()


@pytest.fixture(scope="session")
def exported_half(
    merged_half: Path, folder_exporter: FolderExporter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`merged_half` exported in the smallest format."""
    from losa_deploy.progress import no_progress

    folder = tmp_path_factory.mktemp("exported_half")
    model = SparseModel.open(merged_half)
    plan = folder_exporter.plan(model, ExportRecipe())
    folder_exporter.export(model, plan, folder, no_progress)
    return folder
