"""llama.cpp, as it is and with our backend, against torch on the tiny trained model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.interfaces import Session, no_progress
from losa_deploy.layouts.base import ValueType
from losa_deploy.model import SparseModel
from losa_deploy.parity import greedy, kl_divergence
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.llamacpp.runtime import ExpandedLlamaCppRuntime, StockLlamaCppRuntime
from losa_deploy.runtimes.reference import ReferenceRuntime, ReferenceSession
from losa_deploy.text import load_tokenizer
from losa_deploy.verify import _overrides

from .conftest import prune

STEPS = 60


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """The tiny model with half of each row pruned."""
    return prune(tiny_llama, tmp_path_factory.mktemp("merged_tiny"))


@pytest.fixture(scope="module")
def exported(merged: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[ValueType, Path]:
    """Folders with a packed and a portable file, by value type."""
    folders: dict[ValueType, Path] = {}
    kinds: tuple[ValueType, ...] = ("f32", "f16", "i8", "i4")
    for value_type in kinds:
        folder = tmp_path_factory.mktemp(f"exported_{value_type}")
        recipe = ExportRecipe(value_type=value_type, group_size=32, packed=True, portable=True)
        GgufExporter().export(merged, recipe, folder, no_progress)
        folders[value_type] = folder
    return folders


@pytest.fixture(scope="module")
def reference(merged: SparseModel) -> Iterator[ReferenceSession]:
    session = ReferenceRuntime().open(merged.folder, threads=1)
    yield session
    session.close()


@pytest.fixture(scope="module")
def tokens(tiny_llama: Path, tiny_text: str) -> list[int]:
    return load_tokenizer(tiny_llama).encode(tiny_text)[:200]


def divergence(reference: Session, session: Session, tokens: list[int]) -> float:
    return float(kl_divergence(reference.logits(tokens), session.logits(tokens)).mean())


def packed_and_portable(folder: Path) -> tuple[Path, Path]:
    packed = next(folder.glob("*LOSA*.gguf"))
    return packed, next(path for path in folder.glob("*.gguf") if path != packed)


@pytest.mark.parametrize("value_type", ["f32", "f16"])
def test_stock_gives_the_tokens_of_torch(
    exported: dict[ValueType, Path], value_type: ValueType, reference: ReferenceSession, tokens: list[int]
) -> None:
    session = StockLlamaCppRuntime().open(exported[value_type], threads=1)
    expected = greedy(reference, tokens[:12], STEPS)
    assert len(set(expected.tokens)) > 10
    assert greedy(session, tokens[:12], STEPS).tokens == expected.tokens
    session.close()


def test_stock_refuses_a_packed_file(exported: dict[ValueType, Path]) -> None:
    packed, _ = packed_and_portable(exported["i8"])
    with pytest.raises(InputError, match="unknown model architecture: 'losa-packed'") as error:
        StockLlamaCppRuntime().open(packed, threads=1)
    assert "--runtime llamacpp" in error.value.hint


@pytest.mark.parametrize("kind", ["f32", "i4"])
def test_expanded_is_what_the_bytes_mean(
    exported: dict[ValueType, Path], kind: ValueType, merged: SparseModel, tokens: list[int]
) -> None:
    weights = _overrides(merged, GgufExporter().decode(exported[kind]))
    oracle = ReferenceRuntime().open_with(merged.folder, weights, threads=1)
    session = ExpandedLlamaCppRuntime().open(exported[kind], threads=1)
    expected, found = oracle.logits(tokens), session.logits(tokens)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    session.close()
    oracle.close()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_architecture(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lmaal", 1))


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (cut, "not within the file bounds", "again"),
        (lambda path: path.write_bytes(b"no model" * 100), "magic", "again"),
        (lambda path: path.write_bytes(b""), "cannot open", ""),
        (rename_architecture, "unknown model architecture: 'lmaal'", "upgrade llama-cpp-python"),
    ],
    ids=["half", "another file", "empty", "unknown architecture"],
)
def test_damaged_files_are_refused_with_the_reason(
    exported: dict[ValueType, Path], tmp_path: Path, damage: object, message: str, hint: str
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(packed_and_portable(exported["f32"])[1], path)
    assert callable(damage)
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        StockLlamaCppRuntime().open(path, threads=1)
    assert hint in error.value.hint
