"""Importances for llama.cpp's quantizer: their definition, their names, and that the quantizer heeds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import save_file

from losa_deploy.benchmarks import imatrix
from losa_deploy.benchmarks.gguf_sizes import block_sizes
from losa_deploy.benchmarks.synthetic import ggufs
from losa_deploy.benchmarks.synthetic.decoder import Geometry
from losa_deploy.errors import LosaError
from losa_deploy.pretrained import load_model
from losa_deploy.recipe import CalibrationRecipe
from losa_deploy.sources.checkpoint import Checkpoint

WIDE = Geometry("wide", 256, 512, 1, 4, 4, 512)
"""Rows of whole K-blocks: nothing falls back to a larger type."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense F16 file of that shape."""
    folder = tmp_path_factory.mktemp("wide")
    ggufs.build_peer(WIDE, "f16", folder / "f16", seed=1, threads=1)
    return folder / "f16" / "model.gguf"


def test_importance_is_the_mean_square_of_every_input(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("Anna has 2 red apples. Ben has 3 green doors. " * 40, "utf-8")
    calibration = CalibrationRecipe(source=str(text), samples=4, sequence_length=32)
    source = Checkpoint.open(tiny_llama)
    found = imatrix.importance(source, calibration, seed=5)
    assert set(found) == set(source.linears)

    from losa_deploy.compress.calibrate import text_tokens

    tokens = text_tokens(tiny_llama, text, 4, 32, 5)
    model, seen = load_model(tiny_llama), []
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=tokens)
    expected = seen[0].reshape(-1, 192).square().mean(dim=0).numpy()
    np.testing.assert_allclose(found["model.layers.1.mlp.down_proj"], expected, rtol=1e-4)


def test_types_below_three_and_a_half_bits_need_importances(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(LosaError, match="could not quantize"):
        ggufs.quantize(wide, "iq3_xxs", 1, tmp_path / "without.gguf")
    names = [t.name for t in GGUFReader(wide).tensors if t.name.startswith("blk.0.") and len(t.shape) == 2]
    widths = {t.name: int(t.shape[0]) for t in GGUFReader(wide).tensors}
    flat = {name: np.ones(widths[name], np.float32) for name in names}
    steep = {name: np.geomspace(1e-3, 1e3, widths[name]).astype(np.float32) for name in names}
    files = {}
    for label, weights in (("flat", flat), ("steep", steep)):
        save_file(weights, tmp_path / f"{label}.safetensors")
        files[label] = tmp_path / f"{label}.gguf"
        ggufs.quantize(wide, "iq3_xxs", 1, files[label], tmp_path / f"{label}.safetensors")
    sizes = block_sizes(files["flat"])
    assert "IQ3_XXS" in sizes.types and 2.9 < sizes.bits_per_weight < 3.5
    stored = {
        label: next(t.data.tobytes() for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
        for label, path in files.items()
    }
    assert stored["flat"] != stored["steep"]  # the quantizer used what it was given


def test_sizes_are_those_of_the_stored_blocks(wide: Path, tmp_path: Path) -> None:
    assert block_sizes(wide).bits_per_weight == 16.0
    ggufs.quantize(wide, "q4_0", 1, tmp_path / "q4_0.gguf")
    sizes = block_sizes(tmp_path / "q4_0.gguf")
    assert sizes.weights == 4 * 256 * 256 + 3 * 256 * 512
    assert sizes.types["Q4_0"] >= 6 and 4.5 <= sizes.bits_per_weight < 4.7
