"""Charts as SVG: well-formed, every value where its axes put it, and what is odd left out."""

from __future__ import annotations

from itertools import combinations
from xml.etree import ElementTree

import pytest

from losa_deploy.benchmarks.svg import BOTTOM, HEIGHT, LEFT, TOP, Curve, Point, Scale, lines, scatter
from losa_deploy.benchmarks.svg_labels import Box, place_labels
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


def test_names_of_a_crowd_cover_neither_each_other_nor_a_point() -> None:
    points = [Point(100.0 + i % 3, 20.0 + i % 4, 0.5, f"ik-iq{i}_k", "peer", 0.5) for i in range(14)]
    spots = [(300.0 + 2 * (i % 3), 200.0 + 3 * (i % 4)) for i in range(14)]
    area, corner = Box(70, 30, 760, 410), Box(610, 0, 760, 60)
    labels = place_labels([p.name for p in points], spots, [], area, corner)
    boxes = [label.box for label in labels]
    assert [label.text for label in labels] == [p.name for p in points]
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))
    dots = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    assert all(box.overlap(dot) == 0 for box in boxes for dot in dots)
    assert all(area.left <= box.left and box.right <= area.right for box in boxes)
    root = ElementTree.fromstring(scatter(points, "T", "MB", "perplexity", scale="near"))
    assert {p.name for p in points} <= {text.text for text in root.iter(f"{SPACE}text")}


def test_a_name_off_its_point_has_a_line_to_it() -> None:
    area, corner = Box(0, 0, 400, 300), Box(399, 0, 400, 1)
    near, far = place_labels(["one", "two"], [(200, 100), (200, 100)], [], area, corner)
    assert not near.far_from((200, 100))
    third = place_labels(["a"] * 3, [(200, 100)] * 3, [], area, corner)[2]
    assert third.far_from((200, 100)) and far.anchor == "end"


@pytest.mark.parametrize(("scale", "first"), [("zero", False), ("near", True), ("log", True)])
def test_an_axis_may_start_near_the_points(scale: Scale, first: bool) -> None:
    points = [Point(x, 10.0, 0.0, str(x), "peer") for x in (100.0, 200.0, 400.0)]
    root = ElementTree.fromstring(scatter(points, "T", "MB", "perplexity", scale=scale))
    spots = [float(c.attrib["cx"]) for c in root.iter(f"{SPACE}circle")]
    assert (spots[0] - LEFT < 0.2 * (spots[2] - LEFT)) == first
    steps = (spots[1] - spots[0], spots[2] - spots[1])
    assert steps[0] / steps[1] == pytest.approx(1.0 if scale == "log" else 0.5, abs=0.01)
    alone = scatter(points[:1], "T", "MB", "perplexity", scale=scale)
    assert "nan" not in alone and len(list(ElementTree.fromstring(alone).iter(f"{SPACE}circle"))) == 1


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
