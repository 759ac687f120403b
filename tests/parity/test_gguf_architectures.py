"""An architecture described outside of the exporter decides what the writer writes and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf import architectures
from losa_deploy.exporters.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    Part,
    decoder_keys,
    decoder_parts,
    register,
)
from losa_deploy.exporters.gguf.architectures.keys import Keys
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.model import SparseModel
from losa_deploy.progress import no_progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint, copy_side_files, write_weights

INNER = "mlp.inner_norm"
CONFIG = {"model_type": "toy-lm", "hidden_activation": "gelu", "soft_cap": 30.0}


def toy_keys(checkpoint: Checkpoint) -> Keys:
    return {**decoder_keys(checkpoint), "attention.soft_cap": float(str(checkpoint.config["soft_cap"]))}


def shifted(name: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector + np.float32(1) if name.endswith("norm.weight") else vector


def reversed_values(config: Mapping[str, object], module: str, rows: int) -> NDArray[np.intp] | None:
    return np.arange(rows)[::-1] if module.endswith("v_proj") else None


def refuse_large_caps(config: Mapping[str, object]) -> None:
    if float(str(config["soft_cap"])) > 100:
        raise InputError("the soft_cap is too large")


TOY = Architecture(
    "toy",
    ("toy-lm",),
    (*decoder_parts(), Part(INNER, "ffn_inner_norm")),
    keys=toy_keys,
    activation="gelu",
    activation_key="hidden_activation",
    ropes=(),
    row_order=reversed_values,
    vector=shifted,
    refusals=(refuse_large_caps,),
)


@pytest.fixture()
def registered() -> Iterator[None]:
    register(TOY)
    yield
    del ARCHITECTURES["toy-lm"]


@pytest.fixture(scope="module")
def folder(merged_llama: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's merged folder with one more norm in each block."""
    checkpoint, folder = merged_llama.checkpoint, tmp_path_factory.mktemp("toy")
    copy_side_files(checkpoint.folder, folder)
    tensors = [(name, checkpoint.tensor(name)) for name in checkpoint.files]
    tensors += [(f"model.layers.{block}.{INNER}.weight", torch.full((64,), block + 0.5)) for block in (0, 1)]
    write_weights(folder, tensors)
    return folder


def toy(folder: Path, model: SparseModel, **changes: object) -> Checkpoint:
    return Checkpoint(folder, {**model.config, **CONFIG, **changes}, model.family)


def test_tensors_and_keys_are_those_of_the_description(
    registered: None, folder: Path, merged_llama: SparseModel, tmp_path: Path
) -> None:
    source = toy(folder, merged_llama)
    GgufExporter().check_source(source, ExportRecipe())
    GgufExporter().export_dense(source, merged_llama.folder, tmp_path, no_progress)
    reader = GGUFReader(next(tmp_path.glob("*.gguf")))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "toy"
    assert (keys["toy.block_count"], keys["toy.embedding_length"], keys["toy.attention.soft_cap"]) == (
        2,
        64,
        30,
    )
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert "blk.0.attn_q_norm.weight" not in tensors and "output.weight" not in tensors
    assert list(tensors)[10] == "blk.0.ffn_inner_norm.weight"
    for block in (0, 1):
        assert np.array_equal(tensors[f"blk.{block}.ffn_inner_norm.weight"], np.full(64, block + 1.5, "f4"))
    norm = merged_llama.checkpoint.array("model.norm.weight")
    assert np.array_equal(tensors["output_norm.weight"], norm + np.float32(1))
    for part, module, order in (("attn_v", "v_proj", -1), ("attn_q", "q_proj", 1)):
        weight = merged_llama.checkpoint.array(f"model.layers.1.self_attn.{module}.weight")
        assert np.array_equal(tensors[f"blk.1.{part}.weight"], weight.astype(np.float16)[::order])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation 'silu'; llama.cpp computes toy with gelu"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'; this exporter writes none"),
        ({"soft_cap": 200.0}, "soft_cap is too large"),
        ({"model_type": "llama"}, f"{INNER}.weight, which llama.cpp's llama does not read"),
        ({"model_type": "other"}, "no graph for other as this exporter writes it; .*, toy-lm"),
    ],
)
def test_what_the_description_does_not_allow_is_refused(
    registered: None, folder: Path, merged_llama: SparseModel, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        GgufExporter().check_source(toy(folder, merged_llama, **changes), ExportRecipe())


def test_every_file_of_the_folder_registers_itself() -> None:
    shared = {"base", "config", "keys", "refusals", "rope", "rows"}
    files = {path.stem for path in Path(architectures.__file__).parent.glob("[!_]*.py")} - shared
    assert files == {kind.name for kind in ARCHITECTURES.values()}
