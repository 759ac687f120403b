"""The verdict over many files, and the picture of them, from numbers that are known."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from losa_deploy.benchmarks.accuracy import summarize
from losa_deploy.benchmarks.contest import entries, quality_plots, short_names
from losa_deploy.benchmarks.contest_verdict import (
    Entry,
    best,
    better,
    dominates,
    faster,
    front,
    smaller,
    verdict,
)
from losa_deploy.benchmarks.gguf_sizes import zero_share
from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
from losa_deploy.benchmarks.synthetic.ggufs import build_peer
from losa_deploy.benchmarks.synthetic.peers import Contender
from losa_deploy.gguf.file import open_gguf
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime
from losa_deploy.verify.distance import Floats

SPACE = "{http://www.w3.org/2000/svg}"
HARD = np.random.default_rng(0).gamma(2.0, 1.5, (16, 100))
"""Losses of sixteen windows: the same tokens are hard for all models."""


def losses(shift: float) -> list[Floats]:
    noise = np.random.default_rng(int(1000 * shift) + 7).normal(0.0, 0.05, HARD.shape)
    return list(HARD + shift + noise)


def entry(
    name: str, megabytes: float, decode: float, shift: float, *, own: bool = False, noise: float = 0.0
) -> Entry:
    found = losses(shift)
    return Entry(name, int(megabytes * 1e6), decode, noise, summarize(found, 100).perplexity, found, own)


OURS = entry("ours", 75, 50, 0.5, own=True)
Q4 = entry("q4_0", 92, 50, 0.0)
Q3 = entry("q3_k_s", 88, 45, 0.1)
FAST = entry("ik-q4_0", 92, 60, 0.0)
BAD = entry("bad", 95, 40, 0.6)


def test_respects_are_compared_beyond_chance_noise_and_trifles() -> None:
    assert better(Q4, Q3) and not better(Q3, Q4)
    near = entry("near", 92, 50, 0.001)
    assert not better(Q4, near) and not better(near, Q4)
    assert abs(near.perplexity - Q4.perplexity) < 0.05 < near.perplexity * 0.1
    assert faster(FAST, Q4) and not faster(entry("1 % faster", 92, 50.5, 0), Q4)
    assert not faster(entry("noisy", 92, 60, 0, noise=0.3), Q4)
    assert smaller(Q3, Q4) and not smaller(entry("a trifle smaller", 91.5, 50, 0), Q4)


def test_a_file_is_dominated_by_one_that_is_worse_in_nothing() -> None:
    assert dominates(FAST, Q4) and not dominates(Q4, FAST)
    assert not dominates(FAST, OURS) and not dominates(OURS, FAST)  # better and faster, but larger
    assert not dominates(Q4, Q4)
    assert [e.name for e in front([OURS, Q4, Q3, FAST, BAD])] == ["ours", "q3_k_s", "ik-q4_0"]


def test_ties_in_what_is_wished_for_are_decided_by_the_rest() -> None:
    assert best([Q4, FAST, BAD], "quality") is FAST
    assert best([Q4, FAST, BAD, OURS], "size") is OURS
    slim = entry("slim", 80, 60.1, 0.0)
    assert best([FAST, slim, Q4], "speed") is slim


def test_a_verdict_names_a_file_for_every_wish_and_stands_by_the_users_own() -> None:
    found = verdict([OURS, Q4, Q3, FAST, BAD])
    assert found["take"] == {"quality": "ik-q4_0", "speed": "ik-q4_0", "size": "ours"}
    assert found["front"] == ["ours", "q3_k_s", "ik-q4_0"]
    assert found["files"] == [
        {
            "name": "ours",
            "dominated_by": [],
            "best_at_no_less_speed": "ik-q4_0",
            "best_at_no_more_bytes": "ours",
        }
    ]
    first, second, third = found["lines"]
    assert first.startswith("For quality and speed take ik-q4_0 (perplexity ")
    assert first.endswith("decode 60.0 tokens/s, 92.0 MB).")
    assert second.startswith("For size take ours (")
    assert third.startswith(
        "No other file is as good, as fast and as small as ours; at no less speed the best"
    )
    assert "is ik-q4_0 (0.5" in third and "decode 1.20×, 23% larger)" in third
    assert third.endswith("at no more bytes none is surely better.")


def test_a_pruned_baseline_is_told_by_its_zeros(tmp_path: Path) -> None:
    build_peer(GEOMETRIES["tiny"], "f16", tmp_path / "tiny-f16", 0, 1)
    dense = tmp_path / "tiny-f16" / "model.gguf"
    assert zero_share(dense) < 0.01
    content = bytearray(dense.read_bytes())
    with open_gguf(dense) as file:
        tensor = next(t for t in file.tensors if t.name.startswith("blk.") and len(t.dims) == 2)
    half = tensor.bytes // 2
    content[tensor.offset : tensor.offset + half] = bytes(half)
    dense.write_bytes(content)
    assert zero_share(dense) == pytest.approx(0.5, abs=0.01)


def test_where_ours_loses_in_everything_another_file_is_named() -> None:
    lost = entry("lost", 92, 50, 0.2, own=True)
    found = verdict([lost, Q3, Q4, FAST])
    assert found["lines"][-1].startswith("Instead of lost take ik-q4_0: 0.2")
    assert found["lines"][-1].endswith("better, decode 1.20×, of the same size.")
    assert "lost" not in list(found["take"].values())
    same = verdict([entry("own", 100, 50, 0.0, own=True), Q4])
    assert same["lines"][0].startswith("Take q4_0 (") and "none of 2 files is better" in same["lines"][0]
    assert "equally good within chance" in same["lines"][1] and "as fast within noise" in same["lines"][1]
    assert same["lines"][1].endswith("8% smaller.")


def test_ours_is_named_where_it_wins() -> None:
    found = verdict([entry("own", 70, 70, 0.0, own=True), Q4, Q3])
    assert set(found["take"].values()) == {"own"} and found["front"] == ["own"]
    assert found["lines"][1] == (
        "No other file is as good, as fast and as small as own; at no less speed none is surely better; "
        "at no more bytes none is surely better."
    )


def test_one_file_is_no_choice() -> None:
    assert "Nothing to choose from" in verdict([OURS])["lines"][0]


def contender(name: str, rates: list[float], shift: float | None, *, own: bool = False) -> Contender:
    runtime = LlamaCppRuntime()
    made = Contender(name, Path(name), 10_000_000, runtime if own else runtime.baseline(), own=own)
    made.decode_rates, made.prefill_rates = rates, rates
    if shift is not None:
        made.losses = losses(shift)
        made.quality = summarize(made.losses, 100)
    return made


def test_points_have_short_names_error_bars_and_the_colour_of_their_runtime() -> None:
    models = [contender("build/demo", [10.0, 12.0, 14.0], 0.3, own=True), contender("q4_0", [20.0] * 3, 0.0)]
    models.append(contender("ik-q4_0", [1.0], None))
    root = ElementTree.fromstring(quality_plots(models))
    charts = list(root.iter(f"{SPACE}svg"))[1:]
    assert len(charts) == 2
    for chart in charts:
        names = [text.text for text in chart.iter(f"{SPACE}text")]
        assert {"demo", "q4_0", "this model", "llama.cpp", "perplexity"} <= set(names)
        assert "ik-q4_0" not in names  # it has no perplexity
        assert len({c.attrib["fill"] for c in chart.iter(f"{SPACE}circle")}) == 2
    demo, q4_0 = [float(c.attrib["cx"]) for c in charts[0].iter(f"{SPACE}circle")]
    flat = [line for line in charts[0].iter(f"{SPACE}line") if line.attrib["y1"] == line.attrib["y2"]]
    bars = [line for line in flat if line.attrib["stroke"] != "#ddd"]
    assert len(bars) == 1  # the speed of q4_0 does not vary
    middle = (float(bars[0].attrib["x1"]) + float(bars[0].attrib["x2"])) / 2
    assert middle == pytest.approx(demo, abs=0.2) and demo < q4_0


def test_paths_that_end_alike_keep_their_folders_in_a_picture() -> None:
    models = [contender(name, [1.0], 0.0, own=True) for name in ("a/demo", "b/demo", "c/other")]
    assert short_names(models) == ["a/demo", "b/demo", "other"]
    assert [e.name for e in entries(models)] == ["a/demo", "b/demo", "c/other"]
    assert all(e.own for e in entries(models))
