"""The model card: its YAML head, what it says, and the reader's own text surviving a re-run."""

from __future__ import annotations

from pathlib import Path

import yaml

from losa_deploy.card import BEGIN, END, CardNumbers, mean_bits, own_text, render_card, write_card
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.exporters.onnx.exporter import OnnxExporter
from losa_deploy.manifest import Manifest, SourceRecord

NUMBERS = CardNumbers(
    rows=(("size", "540.0 MB", "540.0 MB", "120.0 MB"),),
    machine="Some CPU, 2 cores",
    conditions="2 threads",
    evaluation="text `builtin`, 100 tokens in windows of 50",
    verdict=("Smaller: yes.", "Not faster here: no."),
)


def head(card: str) -> dict[str, object]:
    data = yaml.safe_load(card.split("---")[1])
    assert isinstance(data, dict)
    return data


def test_the_head_inherits_the_license_and_names_the_base_model(merged_half: Path) -> None:
    manifest = Manifest.read(merged_half)
    assert head(render_card(manifest, NUMBERS)) == {
        "base_model": "someone/tiny",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["losa", "sparse", "safetensors"],
    }
    local = manifest.model_copy(update={"source": SourceRecord(id="my-model"), "format": "onnx"})
    found = head(render_card(local, NUMBERS, OnnxExporter().card(local.recipe.export)))
    assert "license" not in found and "base_model" not in found
    assert found["library_name"] == "onnx"


def test_the_body_has_numbers_machine_verdict_and_provenance(merged_half: Path) -> None:
    card = render_card(Manifest.read(merged_half), NUMBERS)
    for part in (
        "# tiny, 50% sparse (safetensors)",
        "pattern 16:32",
        "dense f32 (21 linears): 32.00 bits per block weight",
        "| size | 540.0 MB | 540.0 MB | 120.0 MB |",
        "Measured on Some CPU, 2 cores; 2 threads",
        "- Not faster here: no.",
        "losa-deploy chat -m .",
        "`model.safetensors` sha256 `" + "ab" * 32 + "`",
    ):
        assert part in card
    assert "Not measured" in render_card(Manifest.read(merged_half), None)


def test_a_gguf_card_says_what_opens_which_file(merged_half: Path) -> None:
    manifest = Manifest.read(merged_half).model_copy(update={"format": "gguf"})

    def card(**export: bool) -> str:
        changed = manifest.recipe.export.model_copy(update=export)
        return render_card(manifest, NUMBERS, GgufExporter().card(changed))

    assert "stock tools refuse it" not in card() and "it is not smaller than an unpruned model" in card()
    assert "stock tools refuse it" in card(packed=True) and "is portable" not in card(packed=True)
    both = card(packed=True, portable=True)
    assert "stock tools refuse it" in both and "The other one is portable" in both


def test_own_text_survives_in_place_and_from_the_replaced_output(merged_half: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(merged_half)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    write_card(old, manifest, NUMBERS)
    path = old / "README.md"
    assert own_text(path.read_text("utf-8")) == ""
    edited = path.read_text("utf-8").replace(f"{BEGIN}\n", f"{BEGIN}\n\nMy *notes*.\n\nMore.\n")
    path.write_text(edited.replace("50% sparse", "nonsense"), "utf-8")
    write_card(new, manifest, NUMBERS, previous=old)
    write_card(old, manifest, NUMBERS)
    for folder in (old, new):
        text = (folder / "README.md").read_text("utf-8")
        assert own_text(text) == "My *notes*.\n\nMore."
        assert "nonsense" not in text
        assert text.count(BEGIN) == text.count(END) == 1


def test_a_card_without_markers_has_no_own_text() -> None:
    assert own_text("# A card\n\nText.") == ""
    assert own_text(f"{BEGIN}\nunfinished") == ""


def test_mean_bits_weighs_by_positions(merged_half: Path) -> None:
    manifest = Manifest.read(merged_half)
    first = manifest.linears[0].model_copy(update={"shape": (1, 30), "bytes": 30})
    second = manifest.linears[1].model_copy(update={"shape": (1, 10), "bytes": 40})
    changed = manifest.model_copy(update={"linears": (first, second)})
    assert mean_bits(changed) == 8 * 70 / 40
