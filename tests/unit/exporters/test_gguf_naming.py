"""Names of GGUF files."""

from __future__ import annotations

import pytest

from losa_deploy.exporters.gguf.naming import file_name, model_name


@pytest.mark.parametrize(
    ("source", "label", "expected"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 GGUF)",
            "LOSA-I8",
            "SmolLM2-135M-Instruct-LOSA-I8.gguf",
        ),
        ("Qwen/Qwen2.5-0.5B", "Q8_0", "Qwen2.5-0.5B-Q8_0.gguf"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Q4_0", "Mistral-7B-Instruct-v0.3-Q4_0.gguf"),
        ("Tiny-Model-F32.gguf", "F16", "Tiny-Model-135M-F16.gguf"),
        ("smollm2.Q4_K_M.gguf", "F16", "smollm2-135M-F16.gguf"),
        ("tiny", "F32", "tiny-135M-F32.gguf"),
        ("", "F32", "model-135M-F32.gguf"),
        ("a folder/with: odd * names", "F32", "with--odd---names-135M-F32.gguf"),
    ],
)
def test_file_names(source: str, label: str, expected: str) -> None:
    assert file_name(source, 134_515_008, label) == expected


def test_parts_of_a_name() -> None:
    name = model_name("mistralai/Mistral-7B-Instruct-v0.3", 0)
    assert (name.full, name.base, name.size) == ("Mistral 7B Instruct v0.3", "Mistral", "7B")
    assert (name.fine, name.version) == ("Instruct", "v0.3")
    assert (name.organization, name.repository) == ("mistralai", "mistralai/Mistral-7B-Instruct-v0.3")
    assert model_name("Tiny-Model-F32.gguf", 1_000_000).organization == ""
