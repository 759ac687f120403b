"""MUL_MAT of the plug-in inside ggml, against float64 with a tolerance from the rounding of each type."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.ggml import plugin_path
from losa_deploy.layouts import LAYOUTS, PackOptions, unpack
from losa_deploy.layouts.bitmask import share
from losa_deploy.layouts.blob import to_blob

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the plug-in is not built for Windows")

CHILD = Path(__file__).with_name("matmul_child.py")
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8}
"""What the plug-in packs."""
NUMBERS = {**TYPES, "Q1_0": 41}
GROUP = {"Q4_0": 32, "Q8_0": 64}
"""Activations that share a scale when they are rounded to int8."""
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
SlidingMask = Callable[[int, int, int], NDArray[np.bool_]]


@dataclass
class Case:
    """A weight as stock bytes, what it means in float64, and the activations."""

    kind: str
    stock: Bytes
    weight: Floats
    x: NDArray[np.float32]
    threads: int = 2
    lie: int = 0
    chunks: int = 1
    group: int = 0
    extra: float = 0.0
    """Of the sum of magnitudes: for scales that are rounded to f16."""

    @property
    def tolerance(self) -> Floats:
        """Half a step of the rounded activations per kept weight, and f32 sums.

        Kernels may raise levels by 8 and take that off the sum again, which counts if all weights are zero.
        """
        size = np.abs(self.x.astype(np.float64)) @ np.abs(self.weight).T
        bound = size * (self.extra + self.x.shape[2] * 2.0**-23)
        group = self.group or GROUP.get(self.kind, 0)
        if group:
            columns = self.x.shape[2]
            parts = range(0, columns, group)
            for at in parts:
                step = np.abs(self.x[:, :, at : at + group]).max(axis=2, keepdims=True) / 127
                bound += step * 0.501 * np.abs(self.weight[:, at : at + group]).sum(axis=1)
        if self.kind == "Q4_0":
            scales = self.stock.reshape(len(self.weight), -1, 18)[:, :, :2].copy().view(np.float16)
            raised = 8 * np.abs(scales.astype(np.float64)).max(axis=(1, 2))
            bound += np.abs(self.x.astype(np.float64)).sum(axis=2)[..., None] * raised * 2.0**-23
        return bound + 1e-30


def values_of(kind: str, stock: Bytes, rows: int, columns: int) -> Floats:
    """What stock bytes mean, by ggml's own definition of the types."""
    if kind in ("F32", "F16"):
        return (
            stock.view(np.float32 if kind == "F32" else np.float16).reshape(rows, columns).astype(np.float64)
        )
    blocks = stock.reshape(rows, columns // 32, -1)
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float64)
    body = blocks[:, :, 2:]
    if kind == "Q8_0":
        levels = np.ascontiguousarray(body).view(np.int8).astype(np.float64)
    else:
        levels = np.concatenate([body & 15, body >> 4], axis=2).astype(np.float64) - 8
    return (levels * scale).reshape(rows, columns)


def random_stock(rng: np.random.Generator, kind: str, mask: NDArray[np.bool_]) -> Bytes:
    """Stock bytes with values that are not zero where the mask is set; Q8_0 with one scale per row."""
    rows, columns = mask.shape
    if kind in ("F32", "F16"):
        weight = np.where(mask, rng.standard_normal((rows, columns)), 0)
        return weight.astype(np.float32 if kind == "F32" else np.float16).reshape(-1).view(np.uint8)
    groups = columns // 32
    scale = rng.uniform(0.001, 0.02, (rows, 1 if kind == "Q8_0" else groups, 1)).astype(np.float16)
    scale = np.ascontiguousarray(np.broadcast_to(scale, (rows, groups, 1)))
    lowest, highest = (-127, 127) if kind == "Q8_0" else (-8, 7)
    levels = rng.integers(lowest, highest + 1, (rows, columns))
    levels = np.where(mask, np.where(levels == 0, 1, levels), 0).reshape(rows, groups, 32)
    if kind == "Q8_0":
        body = levels.astype(np.int8).view(np.uint8)
    else:
        body = (levels[:, :, :16] + 8 | levels[:, :, 16:] + 8 << 4).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8).reshape(rows, groups, 2), body], axis=2).reshape(-1)


def case(
    kind: str, rows: int, columns: int, tokens: int, kept: float = 0.4, batch: int = 1, **rest: int
) -> Case:
    rng = np.random.default_rng([rows, columns, tokens])
    stock = random_stock(rng, kind, rng.random((rows, columns)) < kept)
    x = rng.standard_normal((batch, tokens, columns)).astype(np.float32)
    return Case(kind, stock, values_of(kind, stock, rows, columns), x, **rest)


def run(
    cases: list[Case], folder: Path, route: str, **environment: str
) -> tuple[list[tuple[Floats, Bytes]], list[dict[str, Any]]]:
    """y and weight of each case, and the child's notes."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for i, c in enumerate(cases):
        arrays[f"w_{i}"], arrays[f"x_{i}"] = c.stock, c.x
        arrays[f"spec_{i}"] = np.array([NUMBERS[c.kind], len(c.weight), c.threads, c.lie, c.chunks])
    np.savez(folder / "cases.npz", **arrays)
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder / "cases.npz"), str(folder / "results.npz")],
        env={**os.environ, "LOSA_GGML": route, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["route"] == route
    with np.load(folder / "results.npz") as results:
        return [(results[f"y_{i}"].astype(np.float64), results[f"w_{i}"]) for i in range(len(cases))], facts[
            "notes"
        ]


def check(cases: list[Case], results: list[tuple[Floats, Bytes]]) -> None:
    for c, (y, back) in zip(cases, results, strict=True):
        wanted = c.x.astype(np.float64) @ c.weight.T
        worst = float((np.abs(y - wanted) / c.tolerance).max())
        label = f"{c.kind} {c.weight.shape} x {c.x.shape}, {c.threads} threads, lie {c.lie}"
        assert worst <= 1, f"{label}: {worst:.2f} of the tolerance"
        assert np.array_equal(back, c.stock), f"{label}: other bytes come back"


@pytest.mark.parametrize("route", ["a", "b"])
@pytest.mark.parametrize("kind", TYPES)
def test_products_and_bytes(kind: str, route: str, tmp_path: Path) -> None:
    cases = [case(kind, 37, 96, tokens, threads=threads) for tokens in (1, 2, 7, 33) for threads in (1, 2)]
    cases += [
        case(kind, 200, 352, 515),
        case(kind, 1, 32, 3),
        case(kind, 40, 64, 5, batch=3),
        case(kind, 40, 64, 5, batch=3, lie=1),
        case(kind, 40, 64, 5, batch=2, lie=2),
        case(kind, 40, 64, 1, lie=2),
        case(kind, 40, 64, 4, kept=1.0),
        case(kind, 41, 160, 4, kept=1.0),
        case(kind, 40, 64, 4, kept=0.0),
        case(kind, 41, 96, 4, chunks=3),
    ]
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    counts = [n["statistics"] for n in notes]
    assert counts[-1] == {**counts[-1], "tensors": len(cases), "dense": counts[-1]["dense"]}
    assert counts[-1]["dense"] >= 2, "weights without zeros are kept dense"
    assert counts[-1]["packed"] >= len(cases) - 5


@pytest.mark.parametrize("route", ["a", "b"])
def test_stock_bytes_where_our_types_do_not_hold_them(route: str, tmp_path: Path) -> None:
    """Q8_0 with several scales in a row, or with the level -128, stays as it is and is computed by ggml."""
    cases = []
    for tokens in (1, 9):
        plain = case("Q8_0", 24, 96, tokens)
        blocks = plain.stock.reshape(24, 3, 34).copy()
        blocks[5, 1, :2] = np.array([0.5], np.float16).view(np.uint8)
        blocks[5, 1, 2:5] = 9
        lowest = plain.stock.reshape(24, 3, 34).copy()
        lowest[3, 0, 2] = 0x80
        for changed in (blocks, lowest):
            stock = changed.reshape(-1)
            weight = values_of("Q8_0", stock, 24, 96)
            cases.append(Case("Q8_0", stock, weight, plain.x, group=32, extra=2.0**-10))
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert notes[-1]["statistics"]["dense"] == len(cases)


@pytest.mark.parametrize("route", ["a", "b"])
def test_weights_of_the_type_that_views_declare_stay_as_they_are(route: str, tmp_path: Path) -> None:
    """Q1_0: per 128 positions an f16 scale, then a bit per position that is its sign."""
    rng = np.random.default_rng(8)
    cases = []
    for tokens in (1, 9):
        scale = rng.uniform(0.01, 0.1, (24, 3, 1)).astype(np.float16)
        bits = rng.integers(0, 256, (24, 3, 16), dtype=np.uint8)
        signs = np.unpackbits(bits, axis=2, bitorder="little").astype(np.float64) * 2 - 1
        stock = np.concatenate([scale.view(np.uint8), bits], axis=2).reshape(-1)
        weight = (signs * scale.astype(np.float64)).reshape(24, 384)
        x = rng.standard_normal((1, tokens, 384)).astype(np.float32)
        cases.append(Case("Q1_0", stock, weight, x, group=32, extra=2.0**-10))
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert notes[-1]["statistics"]["dense"] == len(cases)


@pytest.mark.parametrize("kind", TYPES)
def test_n_of_m_is_recognised(kind: str, tmp_path: Path) -> None:
    """2:4 and 4:8 by the places of the zeros: they need no starts of rows, as one value less shows."""
    rows, columns, cases = 24, 192, []
    starts = 8 * rows // (2 if kind == "Q4_0" else 1)
    rng = np.random.default_rng(5)
    for m in (4, 8):
        ones = np.arange(columns).reshape(1, -1, m) % m < m // 2
        mask = rng.permuted(np.repeat(ones, rows, axis=0), axis=2).reshape(rows, columns)
        for less in (0, 1):
            mask[3, np.flatnonzero(mask[3])[:less]] = False
            stock = random_stock(rng, kind, mask)
            x = rng.standard_normal((1, 3, columns)).astype(np.float32)
            cases.append(Case(kind, stock, values_of(kind, stock, rows, columns), x))
    results, notes = run(cases, tmp_path, "a")
    check(cases, results)
    totals = [0, *(note["statistics"]["packed_bytes"] for note in notes)]
    sizes = np.diff(totals)
    for exact, broken in (sizes[:2], sizes[2:]):
        assert 0 <= broken - exact - starts + 64 <= 64, "the stream may have lost its last 64 bytes"


@pytest.mark.parametrize("route", ["a", "b"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_tiles_are_recognised(kind: str, route: str, tmp_path: Path) -> None:
    """N of every 16, with groups that keep fewer because a kept weight was rounded to zero."""
    rng = np.random.default_rng(6)
    cases, expected = [], 0
    for rows, columns, n in ((16, 64, 6), (48, 192, 3), (32, 352, 1), (1024, 512, 6)):
        order = rng.random((rows, columns // 16, 16)).argsort(axis=2)
        mask = (order < n).reshape(rows, columns)
        mask[5, np.flatnonzero(mask[5])[: n // 2]] = False
        for tokens in (1, 6):
            stock = random_stock(rng, kind, mask)
            x = rng.standard_normal((1, tokens, columns)).astype(np.float32)
            cases.append(Case(kind, stock, values_of(kind, stock, rows, columns), x, threads=2))
            slots = rows * columns // 16 * (n + n % 2)
            expected += slots + (16 + 2 * rows * columns // 32 if kind == "Q4_0" else slots // 2 + 2 * rows)
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert notes[-1]["statistics"]["packed_bytes"] == expected


@pytest.mark.parametrize("route", ["a", "b"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_tiles_of_quads_are_recognised(kind: str, route: str, tmp_path: Path) -> None:
    """1:4 and 2:4, with groups that keep fewer; one more in a single group needs another form."""
    rng = np.random.default_rng(7)
    cases, expected = [], []
    for rows, columns, n in ((16, 64, 2), (48, 160, 1), (1024, 512, 2), (32, 96, 1)):
        order = rng.random((rows, columns // 4, 4)).argsort(axis=2)
        mask = (order < n).reshape(rows, columns)
        mask[5, np.flatnonzero(mask[5])[:3]] = False
        slots = rows * columns * n // 4
        lines = -(-columns * n // 8 // 4) * 32 * rows // 16
        scales = 16 + 2 * rows * columns // 32 if kind == "Q4_0" else 2 * rows
        for tokens in (1, 6):
            stock = random_stock(rng, kind, mask)
            x = rng.standard_normal((1, tokens, columns)).astype(np.float32)
            cases.append(Case(kind, stock, values_of(kind, stock, rows, columns), x, threads=2))
            expected.append(lines + scales + (slots // 2 if kind == "Q4_0" else slots))
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert np.diff([0, *(note["statistics"]["packed_bytes"] for note in notes)]).tolist() == expected


@pytest.mark.parametrize("route", ["a", "b"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_sliding_windows_are_recognised(
    kind: str, route: str, sliding_mask: SlidingMask, tmp_path: Path
) -> None:
    """With windows of which a kept weight was rounded to zero; they take the bytes of 2:4."""
    rng = np.random.default_rng(9)
    cases, expected = [], []
    for rows, columns, kept in ((16, 64, 1.0), (48, 160, 0.8), (1024, 512, 0.9)):
        mask = sliding_mask(rows, columns, 0)
        mask &= rng.random((rows, columns)) < kept
        slots = rows * columns // 2
        scales = 16 + 2 * rows * columns // 32 if kind == "Q4_0" else 2 * rows
        for tokens in (1, 6):
            stock = random_stock(rng, kind, mask)
            x = rng.standard_normal((1, tokens, columns)).astype(np.float32)
            cases.append(Case(kind, stock, values_of(kind, stock, rows, columns), x, threads=2))
            expected.append(slots // 4 + scales + (slots // 2 if kind == "Q4_0" else slots))
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert np.diff([0, *(note["statistics"]["packed_bytes"] for note in notes)]).tolist() == expected


@pytest.mark.parametrize("route", ["a", "b"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rows_that_share_masks_are_recognised(kind: str, route: str, tmp_path: Path) -> None:
    """Although kept weights were rounded to zero: both rows keep the positions of either."""
    rng = np.random.default_rng(9)
    cases, expected = [], []
    for rows, columns, kept in ((16, 64, 1.0), (47, 160, 0.98), (1024, 512, 0.98)):
        mask = np.repeat(rng.random((-(-rows // 2), columns)) < 0.5, 2, axis=0)[:rows]
        mask &= rng.random((rows, columns)) < kept
        scales = 16 + 2 * rows * columns // 32 if kind == "Q4_0" else 2 * rows
        for tokens in (1, 2, 6):
            stock = random_stock(rng, kind, mask)
            weight = values_of(kind, stock, rows, columns)
            x = rng.standard_normal((1, tokens, columns)).astype(np.float32)
            cases.append(Case(kind, stock, weight, x, threads=2))
            shared = share(weight != 0)
            values = int(shared[::2].sum() if kind == "Q4_0" else shared.sum())
            starts, words = (-(-rows // 2) if kind == "Q4_0" else rows), -(-rows // 2) * -(-columns // 64)
            expected.append(8 * words + -(-values // 64) * 64 + 64 + scales + 8 * starts)
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert np.diff([0, *(note["statistics"]["packed_bytes"] for note in notes)]).tolist() == expected


def blob_case(value_type: str, kind: str, layout: str, pattern: tuple[int, int] | None, tokens: int) -> Case:
    rng = np.random.default_rng(tokens)
    rows, columns = 48, 128
    mask = rng.random((rows, columns)) < 0.4
    if pattern:
        mask = np.zeros((rows, columns // pattern[1], pattern[1]), bool)
        mask[:, :, : pattern[0]] = True
        mask = rng.permuted(mask, axis=2).reshape(rows, columns)
    if layout == "pairs":
        mask[1::2] = mask[::2]
    weight = np.where(mask, rng.standard_normal((rows, columns)), 0).astype(np.float32)
    options = PackOptions(value_type, 32, pattern=pattern, rows_per_mask=2 if layout == "pairs" else 1)
    packed = LAYOUTS["bitmask" if layout == "pairs" else layout].pack(weight, mask, options)
    size = {"F32": 4 * columns, "F16": 2 * columns, "Q8_0": columns // 32 * 34, "Q4_0": columns // 32 * 18}[
        kind
    ]
    blob = np.frombuffer(to_blob(packed).ljust(size * rows, b"\0"), np.uint8)
    assert len(blob) == size * rows
    x = rng.standard_normal((1, tokens, columns)).astype(np.float32)
    return Case(kind, blob, unpack(packed).weight.astype(np.float64), x)


LAYOUTS_OF_BLOBS = (
    ("bitmask", None), ("pairs", None), ("nm", (1, 4)), ("tiled", (6, 16)), ("tiled", (2, 4)),
)  # fmt: skip


@pytest.mark.parametrize("route", ["a", "b"])
def test_blobs(route: str, tmp_path: Path) -> None:
    """Packed bytes under the declared type of the standard view."""
    cases = [
        blob_case(value_type, kind, layout, pattern, tokens)
        for value_type, kind in (("i8", "Q8_0"), ("i4", "Q8_0"), ("f16", "F16"), ("f32", "F32"))
        for layout, pattern in LAYOUTS_OF_BLOBS
        if layout not in ("tiled", "pairs") or value_type in ("i8", "i4")
        for tokens in (1, 6)
    ]
    cases += [blob_case("i3", "Q8_0", "pairs", None, tokens) for tokens in (1, 2, 6)]
    for c in cases:
        c.group = {"Q8_0": 64}.get(c.kind, 0)
    results, notes = run(cases, tmp_path, route)
    check(cases, results)
    assert notes[-1]["statistics"]["packed"] == len(cases)


def test_references_to_nothing_are_ignored(tmp_path: Path) -> None:
    """A file can have in it what a virtual file writes into the reserved bytes of a header."""
    cases = []
    for number, offset, size in ((1, 0, 128), (1 << 63, 0, 4096), (0, (1 << 64) - 64, 64)):
        plain = blob_case("i8", "Q8_0", "tiled", (6, 16), 2)
        stock = plain.stock.copy()
        reference = struct.pack("<8sQQQ", b"mapped\0\x01", number, offset, size)
        stock[96:128] = np.frombuffer(reference, np.uint8)
        cases.append(Case("Q8_0", stock, plain.weight, plain.x, group=64))
    results, notes = run(cases, tmp_path, "a")
    check(cases, results)
    assert notes[-1]["statistics"]["packed"] == len(cases)


def test_damaged_blobs_compute_nan_and_say_so(tmp_path: Path) -> None:
    good = blob_case("i8", "Q8_0", "bitmask", None, 2)
    cases = []
    for at, value in ((16, 0xFF), (8, 9), (32, 0xC1), (40, 0xFF), (128, 0xFF), (57, 0x7F), (200, 0x55)):
        stock = good.stock.copy()
        stock[at] = value if stock[at] != value else value ^ 1
        cases.append(Case("Q8_0", stock, good.weight, good.x))
    truncated = good.stock.copy()
    truncated[600:] = 0
    cases.append(Case("Q8_0", truncated, good.weight, good.x))
    results, notes = run(cases, tmp_path, "a")
    for (y, _), note in zip(results, notes, strict=True):
        damaged = bool(note["damage"])
        assert damaged == bool(np.isnan(y).all())
        assert damaged == bool(np.isnan(y).any())
    assert sum(bool(note["damage"]) for note in notes) >= 6
    assert notes[0]["damage"].startswith("blk.0.ffn_up.weight is damaged: ")


@pytest.mark.parametrize("kind", TYPES)
def test_memory_is_that_of_the_packed_weight(kind: str, tmp_path: Path) -> None:
    cases = [case(kind, 40, 64, 1), case(kind, 6000, 2048, 1)]
    _, (small, large) = run(cases, tmp_path, "a")
    packed = large["statistics"]["packed_bytes"] - small["statistics"]["packed_bytes"]
    assert packed < 0.75 * cases[1].stock.nbytes
    last_huge_page = 2 << 20
    assert 0.9 * packed < large["resident"] < 1.1 * packed + (1 << 20) + last_huge_page


@pytest.mark.parametrize("route", ["a", "b"])
def test_loadable_backends(route: str, tmp_path: Path) -> None:
    """Prebuilt libraries with loadable backends, which read GGML_BACKEND_PATH themselves.

    LOSA_TEST_GGML_DL: the folder with the libraries of the npm package @node-llama-cpp/linux-x64.
    """
    folder = Path(os.environ.get("LOSA_TEST_GGML_DL", ""))
    if not (folder / "libggml-base.so").is_file():
        pytest.skip("LOSA_TEST_GGML_DL names no folder with libggml-base.so")
    environment = {"LOSA_TEST_LIBRARIES": str(folder), "GGML_BACKEND_PATH": str(plugin_path())}
    cases = [case(kind, 41, 96, tokens) for kind in TYPES for tokens in (1, 9)]
    results, notes = run(cases, tmp_path, route, **environment)
    check(cases, results)
    assert notes[-1]["statistics"]["packed"] == len(cases)
