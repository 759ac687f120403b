"""Charts as SVG: well-formed, every value where its axes put it, and what is odd left out."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from losa_deploy.benchmarks.svg import BOTTOM, HEIGHT, LEFT, TOP, Curve, Point, lines, scatter
from losa_deploy.benchmarks.training import training_plot, training_section
from losa_deploy.manifest import TrainingRecord

SPACE = "{http://www.w3.org/2000/svg}"


def test_points_are_placed_by_bytes_and_the_logarithm_of_quality() -> None:
    points = [Point(x, y, 0.0, f"<{x}>", "peer") for x, y in ((10.0, 10.0), (20.0, 100.0), (30.0, 1000.0))]
    root = ElementTree.fromstring(scatter(points, "T", "MB", "perplexity"))
    spots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SPACE}circle")]
    assert spots[1][0] - spots[0][0] == pytest.approx(spots[0][0] - LEFT, abs=0.2)
    assert spots[0][1] - spots[1][1] == pytest.approx(spots[1][1] - spots[2][1], abs=0.2)
    assert TOP <= spots[2][1] < spots[0][1] <= HEIGHT - BOTTOM
    assert "<10.0>" in [text.text for text in root.iter(f"{SPACE}text")]


def test_charts_without_values_say_so() -> None:
    assert "nothing was measured" in scatter([], "T", "x", "y")
    assert "nothing was trained" in lines([Curve("c", (float("nan"),))], "T", "x", "y")


def test_the_training_of_blocks_and_of_the_model_is_drawn() -> None:
    records = (
        TrainingRecord(step=1, phase=0, tokens=2048, before=(0.4, 0.2), after=(0.2, 0.1)),
        TrainingRecord(step=2, phase=1, tokens=4096, losses=(3.0, 2.5, 2.25)),
    )
    root = ElementTree.fromstring(training_plot(records))
    assert len(list(root.iter(f"{SPACE}svg"))) == 3  # two charts in one picture
    names = [text.text for text in root.iter(f"{SPACE}text")]
    assert {"step 1, phase 0: before", "step 1, phase 0: after", "step 2, phase 1"} <= set(names)
    text = "\n".join(training_section(records))
    assert "![Training](training.svg)" in text
    assert "2,048 tokens per block, error 0.3000 → 0.1500" in text and "loss 3.0000 → 2.2500" in text
    assert training_plot(()) == "" and training_section(()) == []
