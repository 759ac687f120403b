"""llama.cpp, as it is and with our backend, against torch on the tiny trained model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.interfaces import Session
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.runtimes.llamacpp.backend import attach
from losa_deploy.runtimes.llamacpp.runtime import (
    ExpandedLlamaCppRuntime,
    LlamaCppRuntime,
    StockLlamaCppRuntime,
)
from losa_deploy.runtimes.reference import ReferenceRuntime, ReferenceSession
from losa_deploy.text.tokenizer import StreamDecoder, load_tokenizer
from losa_deploy.verify.check import _overrides
from losa_deploy.verify.distance import greedy, kl_divergence
from losa_deploy.verify.oracle import Oracle, Question

from .conftest import export_as, prune

STEPS = 60


@pytest.fixture(scope="module")
def merged(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    """The tiny model with half of each row pruned."""
    return prune(tiny_llama, tmp_path_factory.mktemp("merged_tiny"))


@pytest.fixture(scope="module")
def exported(merged: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a packed and a portable file, by value type."""
    folders: dict[str, Path] = {}
    kinds: tuple[str, ...] = ("f32", "f16", "i8", "i4", "i3")
    for value_type in kinds:
        folder = tmp_path_factory.mktemp(f"exported_{value_type}")
        recipe = ExportRecipe(value_type=value_type, group_size=32, packed=True, portable=True)
        export_as(GgufExporter(), merged, recipe, folder)
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


KINDS = ("packed", "portable")
LIMITS: dict[str, float] = {"f32": 1e-6, "f16": 1e-4, "i8": 0.01, "i4": 0.5, "i3": 1.5}
"""Mean divergence from the merged model, in nats."""


def one_file(folder: Path, kind: str) -> Path:
    return dict(zip(KINDS, packed_and_portable(folder), strict=True))[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_type", ["f32", "f16"])
def test_our_backend_gives_the_tokens_of_torch(
    exported: dict[str, Path],
    value_type: str,
    kind: str,
    reference: ReferenceSession,
    tokens: list[int],
) -> None:
    runtime = LlamaCppRuntime()
    before = taken()
    session = runtime.open(one_file(exported[value_type], kind), threads=1)
    assert runtime.fallback == ""
    assert taken() - before == 21
    expected = greedy(reference, tokens[:12], STEPS)
    assert greedy(session, tokens[:12], STEPS).tokens == expected.tokens
    assert divergence(reference, session, tokens) < LIMITS[value_type]
    session.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_type", ["i8", "i4", "i3"])
def test_integers_stay_close_and_do_what_their_bytes_mean(
    exported: dict[str, Path],
    value_type: str,
    kind: str,
    reference: ReferenceSession,
    tokens: list[int],
) -> None:
    path = one_file(exported[value_type], kind)
    session, exact = (
        runtime.open(path, threads=1) for runtime in (LlamaCppRuntime(), ExpandedLlamaCppRuntime())
    )
    assert divergence(reference, session, tokens) < LIMITS[value_type]
    assert 0 < divergence(exact, session, tokens) < 0.01
    session.close()
    exact.close()


def taken() -> int:
    """Weights that our backend took so far in this process."""
    plugin = attach().plugin
    assert plugin is not None, attach().reason
    return plugin.statistics().tensors


def test_stock_and_ours_side_by_side(exported: dict[str, Path], tokens: list[int]) -> None:
    """A stock model opened while ours is open keeps llama.cpp's own kernels, and the other way round."""
    path = one_file(exported["i8"], "portable")
    start = taken()
    stock = StockLlamaCppRuntime().open(path, threads=1)
    assert taken() == start
    ours = LlamaCppRuntime().open(path, threads=1)
    assert taken() == start + 21
    again = StockLlamaCppRuntime().open(path, threads=1)
    assert taken() == start + 21
    first = stock.logits(tokens)
    assert np.array_equal(again.logits(tokens), first)
    assert 0 < np.abs(ours.logits(tokens) - first).max() < 0.1 * np.abs(first).max()
    for session in (stock, ours, again):
        session.close()


GREEDY = """
import json, sys
from pathlib import Path
from losa_deploy.verify.distance import greedy
from losa_deploy.runtimes.llamacpp.backend import attach
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime
runtime = LlamaCppRuntime()
session = runtime.open(Path(sys.argv[1]), threads=2)
trace = greedy(session, json.loads(sys.argv[2]), int(sys.argv[3]))
plugin = attach().plugin
print(json.dumps({
    "route": plugin.route if plugin else "off",
    "taken": plugin.statistics().tensors if plugin else 0,
    "fallback": runtime.fallback,
    "tokens": [int(token) for token in trace.tokens],
}))
"""


def in_a_process(
    route: str, path: Path, tokens: list[int], code: str = GREEDY
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(path), json.dumps(tokens), str(STEPS)],
        env={**os.environ, "LOSA_GGML": route},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ["a", "b"])
def test_both_routes_give_the_tokens_of_torch(
    exported: dict[str, Path], route: str, kind: str, reference: ReferenceSession, tokens: list[int]
) -> None:
    done = in_a_process(route, one_file(exported["f32"], kind), tokens[:12])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["route"], found["taken"], found["fallback"]) == (route, 21, "")
    assert found["tokens"] == list(greedy(reference, tokens[:12], STEPS).tokens)


LATE = """
import sys, llama_cpp
from pathlib import Path
portable = next(p for p in Path(sys.argv[1]).parent.glob("*.gguf") if "LOSA" not in p.name)
llama_cpp.Llama(str(portable), n_ctx=64, verbose=False)
"""


def test_after_a_model_of_stock_llama_cpp_the_other_route_is_taken(
    exported: dict[str, Path], reference: ReferenceSession, tokens: list[int]
) -> None:
    """llama.cpp notes its buffer types when it loads its first model, and never asks for ours again."""
    packed = one_file(exported["f32"], "packed")
    done = in_a_process("", packed, tokens[:12], LATE + GREEDY)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["route"], found["taken"], found["fallback"]) == ("b", 21, "")
    assert found["tokens"] == list(greedy(reference, tokens[:12], STEPS).tokens)
    done = in_a_process("a", packed, tokens[:12], LATE + GREEDY)
    assert done.returncode != 0
    assert "has loaded a model before, which route a has to precede; unset LOSA_GGML" in done.stderr


def test_switched_off_runs_portable_files_and_refuses_packed_ones(
    exported: dict[str, Path], reference: ReferenceSession, tokens: list[int]
) -> None:
    packed, portable = packed_and_portable(exported["f32"])
    done = in_a_process("off", portable, tokens[:12])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert "LOSA_GGML=off" in found["fallback"]
    assert found["tokens"] == list(greedy(reference, tokens[:12], STEPS).tokens)
    done = in_a_process("off", packed, tokens[:12])
    assert done.returncode != 0
    assert "is packed, and our backend cannot be used: LOSA_GGML=off" in done.stderr


ENABLE = """
import json, sys
from losa_deploy.runtimes.llamacpp import enable
line = enable()
import llama_cpp
from losa_deploy.ggml import load_plugin
model = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, verbose=False)
found = model.generate(json.loads(sys.argv[2]), temp=0.0)
tokens = [next(found) for _ in range(int(sys.argv[3]))]
print(json.dumps({"line": line, "taken": load_plugin().statistics().tensors, "tokens": tokens}))
"""


def test_enable_is_all_that_plain_llama_cpp_python_needs(
    exported: dict[str, Path], reference: ReferenceSession, tokens: list[int]
) -> None:
    done = in_a_process("", one_file(exported["f16"], "portable"), tokens[:12], ENABLE)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert "route a" in found["line"] and found["taken"] == 21
    assert found["tokens"] == list(greedy(reference, tokens[:12], STEPS).tokens)


def test_threads_change_nothing(exported: dict[str, Path], tokens: list[int]) -> None:
    path = one_file(exported["i4"], "packed")
    one, two = (LlamaCppRuntime().open(path, threads=n) for n in (1, 2))
    assert np.abs(one.logits(tokens) - two.logits(tokens)).max() < 1e-3
    one.close()
    two.close()


def test_a_damaged_packed_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = packed_and_portable(exported["i8"])[0].read_bytes()
    at = content.index(b"LOSA\x01")
    for damaged in (content[: len(content) // 2], content[:at] + b"LOSE" + content[at + 4 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.gguf"):
            LlamaCppRuntime().open(path, threads=1)


@pytest.mark.parametrize("value_type", ["f32", "f16"])
def test_stock_gives_the_tokens_of_torch(
    exported: dict[str, Path], value_type: str, reference: ReferenceSession, tokens: list[int]
) -> None:
    session = StockLlamaCppRuntime().open(exported[value_type], threads=1)
    expected = greedy(reference, tokens[:12], STEPS)
    assert len(set(expected.tokens)) > 10
    assert greedy(session, tokens[:12], STEPS).tokens == expected.tokens
    session.close()


def test_stock_refuses_a_packed_file(exported: dict[str, Path]) -> None:
    packed, _ = packed_and_portable(exported["i8"])
    with pytest.raises(InputError, match="unknown model architecture: 'losa-packed'") as error:
        StockLlamaCppRuntime().open(packed, threads=1)
    assert "--runtime llamacpp" in error.value.hint


@pytest.mark.parametrize("kind", ["f32", "i4"])
def test_expanded_is_what_the_bytes_mean(
    exported: dict[str, Path], kind: str, merged: SparseModel, tokens: list[int]
) -> None:
    weights = _overrides(merged, GgufExporter().decode(exported[kind]))
    (expected,) = Oracle(merged.checkpoint, weights).answers([Question.whole(tokens)], threads=1)
    session = ExpandedLlamaCppRuntime().open(exported[kind], threads=1)
    found = session.logits(tokens)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    session.close()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_architecture(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lmaal", 1))


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (cut, "not within the file bounds", "again"),
        (lambda path: path.write_bytes(b"no model" * 100), "starts with b'no m'", "again"),
        (lambda path: path.write_bytes(b""), "it is empty", "again"),
        (rename_architecture, "unknown model architecture: 'lmaal'", "upgrade llama-cpp-python"),
    ],
    ids=["half", "another file", "empty", "unknown architecture"],
)
def test_damaged_files_are_refused_with_the_reason(
    exported: dict[str, Path], tmp_path: Path, damage: object, message: str, hint: str
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copyfile(packed_and_portable(exported["f32"])[1], path)
    assert callable(damage)
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        StockLlamaCppRuntime().open(path, threads=1)
    assert hint in error.value.hint


TEXTS = ("Anna has 2 red apples.", "é 日本語 👩‍👩‍👧 naïve  spaces\n\tend ✓", "<|user|>Hello<|end|>", "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_of_a_file_is_that_of_its_folder(exported: dict[str, Path], kind: str) -> None:
    folder = exported["i8"]
    expected, found = load_tokenizer(folder), load_tokenizer(one_file(folder, kind))
    for text in TEXTS:
        ids = expected.encode(text)
        assert found.encode(text) == ids
        for special in (False, True):
            assert found.decode(ids, special=special) == expected.decode(ids, special=special)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Anna?"}]
    assert found.chat(conversation) == expected.chat(conversation)
    assert found.bos_id == expected.bos_id
    assert set(expected.eos_ids) <= set(found.eos_ids)
    assert found.size == expected.size
    assert StreamDecoder(found).decode_all(found.encode(TEXTS[1])) == TEXTS[1]
