"""Where the names of points stand in a chart, so that each can be read and none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER, LINE = 6.6, 13.0
"""Pixels that a letter and a line of text take, roughly, at a font size of 12."""
DOT = 6.0
"""Half the side of the square that a point keeps free."""
STEPS = 9
"""Lines that a name may stand above or below its point."""
FAR = 10.0
"""Pixels; names further from their point than this get a line to it."""
COVERED, CROSSED, AWAY = 10.0, 3.0, 2.0
"""Costs of a square pixel over other names and points, of one over error bars, and of a pixel of distance."""


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels from the top left."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Label:
    """Text whose first or last letter stands at x, on the line y."""

    text: str
    x: float
    y: float
    anchor: str
    """`start` right of the point, `end` left of it."""

    @property
    def box(self) -> Box:
        """What the text covers."""
        width = CHARACTER * len(self.text)
        left = self.x if self.anchor == "start" else self.x - width
        return Box(left, self.y - LINE + 3, left + width, self.y + 3)

    def far_from(self, spot: tuple[float, float]) -> bool:
        """Whether a line has to say whose name it is."""
        return abs(self.y - 4 - spot[1]) > FAR


def place_labels(
    names: Sequence[str], spots: Sequence[tuple[float, float]], bars: Sequence[Box], area: Box, free: Box
) -> list[Label]:
    """A label for each point at `spots` within `area`, off `bars` where it can be, and off the box `free`.

    Each takes the cheapest place that those before it left.
    """
    dots = [Box(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in spots]
    placed: list[Label] = []
    for name, spot in zip(names, spots, strict=True):
        taken = [*dots, free, *(label.box for label in placed)]
        options = [label for label in _options(name, spot) if _inside(label.box, area)]
        options = options or [Label(name, spot[0] + 8, spot[1] + 4, "start")]
        placed.append(min(options, key=lambda label: _cost(label, spot, taken, bars)))
    return placed


def _options(name: str, spot: tuple[float, float]) -> list[Label]:
    """Beside the point, then ever further above and below."""
    x, y = spot
    rows = sorted(range(-STEPS, STEPS + 1), key=abs)
    return [
        Label(name, x + side, y + 4 + row * LINE, anchor)
        for row in rows
        for side, anchor in ((9.0, "start"), (-9.0, "end"))
    ]


def _inside(box: Box, area: Box) -> bool:
    return (
        area.left <= box.left
        and box.right <= area.right
        and area.top <= box.top
        and box.bottom <= area.bottom
    )


def _cost(label: Label, spot: tuple[float, float], taken: Sequence[Box], bars: Sequence[Box]) -> float:
    covered = sum(label.box.overlap(box) for box in taken)
    crossed = sum(label.box.overlap(box) for box in bars)
    return COVERED * covered + CROSSED * crossed + AWAY * abs(label.y - 4 - spot[1])
