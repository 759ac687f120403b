"""Entry points: found, loaded lazily, and polite when broken."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from losa_deploy import plugins
from losa_deploy.errors import MissingError, UsageError


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `acme-formats` on the path: one exporter works, one needs a missing library."""
    (tmp_path / "acme_good.py").write_text("class Exporter:\n    name = 'acme'\n")
    (tmp_path / "acme_bad.py").write_text("import library_nobody_has\n")
    info = tmp_path / "acme_formats-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[losa_deploy.exporters]\nacme = acme_good:Exporter\nbroken = acme_bad:Exporter\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def test_ours_are_installed() -> None:
    assert {"onnx", "gguf"} <= set(plugins.exporters())
    assert {"ort", "genai", "reference"} <= set(plugins.runtimes())


@pytest.mark.usefixtures("third_party")
def test_a_third_party_exporter_is_found_and_loaded_on_demand() -> None:
    assert {"acme", "broken", "onnx"} <= set(plugins.exporters())
    assert "acme_good" not in sys.modules
    assert plugins.load_exporter("acme").name == "acme"


@pytest.mark.usefixtures("third_party")
def test_a_broken_plug_in_names_its_package() -> None:
    with pytest.raises(MissingError, match=r"acme-formats.*library_nobody_has") as caught:
        plugins.load_exporter("broken")
    assert caught.value.exit_code == 5


def test_unknown_names_get_near_matches() -> None:
    with pytest.raises(UsageError, match="--format onnx"):
        plugins.load_exporter("onxx")
    with pytest.raises(UsageError, match="--runtime ort"):
        plugins.load_runtime("otr")
