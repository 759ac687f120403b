"""Models and flags that the GGUF exporter refuses before any work."""

from __future__ import annotations

import pytest

from losa_deploy.errors import InputError, UsageError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint


def test_opt_is_refused_before_any_work(merged_opt: SparseModel) -> None:
    with pytest.raises(InputError, match="no graph for opt") as caught:
        GgufExporter().check_source(merged_opt.checkpoint, ExportRecipe())
    assert "--format onnx" in caught.value.hint


def test_flags_of_other_formats_are_refused(merged_llama: SparseModel) -> None:
    from losa_deploy.exporters.onnx.exporter import OnnxExporter

    cases = [
        (GgufExporter(), {"bundle_runtime": True}, "--bundle-runtime is for"),
        (GgufExporter(), {"layout": "bitmask"}, "needs --packed"),
        (OnnxExporter(), {"packed": True}, "--packed is for --format gguf"),
    ]
    for exporter, recipe, message in cases:
        with pytest.raises(UsageError, match=message):
            exporter.plan(merged_llama, ExportRecipe.model_validate(recipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 0.7}}, "mscale of YaRN"),
        ({"rope_parameters": {"rope_type": "yarn", "beta_fast": 16.0}}, "beta_fast of YaRN"),
        ({"rope_parameters": {"rope_type": "yarn", "truncate": False}}, "truncate of YaRN to False"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layer_interval 2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"model_type": "qwen2"}, "llama.cpp's qwen2 does not read"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    merged_biased: SparseModel, change: dict[str, object], message: str
) -> None:
    source = Checkpoint(
        merged_biased.folder, {**merged_biased.config, **change}, merged_biased.checkpoint.family
    )
    with pytest.raises(InputError, match=message) as caught:
        GgufExporter().check_source(source, ExportRecipe())
    assert "--format onnx" in caught.value.hint


def test_a_window_shorter_than_the_context_is_refused_before_any_work(merged_llama: SparseModel) -> None:
    """llama.cpp attends to everything; mistral's window is 4096 where config.json does not say."""
    config = {**merged_llama.config, "model_type": "mistral", "max_position_embeddings": 8192}
    for change, window in (({}, 4096), ({"sliding_window": 64}, 64)):
        source = Checkpoint(merged_llama.folder, {**config, **change}, merged_llama.family)
        with pytest.raises(InputError, match=f"sliding_window of {window} tokens in 2 blocks") as caught:
            GgufExporter().check_source(source, ExportRecipe())
        assert "--format onnx" in caught.value.hint
        assert f"max_position_embeddings to {window}" in caught.value.hint
    for change in ({"sliding_window": None}, {"sliding_window": 8192}, {"model_type": "llama"}):
        source = Checkpoint(merged_llama.folder, {**config, **change}, merged_llama.family)
        GgufExporter().check_source(source, ExportRecipe())
