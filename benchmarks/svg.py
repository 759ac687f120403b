"""Small charts as SVG text, without a plotting library: points with names, and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from .svg_labels import LINE, Box, place_labels

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 50
COLOURS = ("#1f6fb4", "#d2601a", "#3a8a3a", "#9a3fa5", "#8a6d3b", "#444444")
TICKS = 5
Scale = Literal["zero", "near", "log"]
"""An axis from 0, from near the first point, or a logarithmic one (for values above 0)."""


@dataclass(frozen=True)
class Point:
    """One value with its errors (in the same unit, may be 0), its name and the group that colours it."""

    x: float
    y: float
    error: float
    name: str
    group: str
    x_error: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Values in order, one per unit of x."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        share = [i / (TICKS - 1) for i in range(TICKS)]
        if self.logarithmic:
            return [float(self.low * (self.high / self.low) ** s) for s in share]
        return [self.low + s * (self.high - self.low) for s in share]


def scatter(points: Sequence[Point], title: str, x: str, y: str, *, scale: Scale = "zero") -> str:
    """Points with their names; y is logarithmic, x as `scale` says. Without points only the title."""
    if not points:
        return _document([_text(WIDTH / 2, HEIGHT / 2, "nothing was measured", "middle")], title)
    horizontal = _x_axis(points, scale)
    low = min(max(p.y - p.error, 0.5 * p.y) for p in points) / 1.05
    vertical = _Axis(low, 1.05 * max(p.y + p.error for p in points), HEIGHT - BOTTOM, TOP, logarithmic=True)
    groups = list(dict.fromkeys(p.group for p in points))
    colours = [COLOURS[groups.index(p.group) % len(COLOURS)] for p in points]
    spots = [(horizontal.at(p.x), vertical.at(p.y)) for p in points]
    bars = [
        bar for p, spot in zip(points, spots, strict=True) for bar in _bars(p, spot, horizontal, vertical)
    ]
    legend = _legend(groups) if len(groups) > 1 else []
    parts = _frame(horizontal, vertical, x, y) + legend
    for point, spot, colour in zip(points, spots, colours, strict=True):
        for bar in _bars(point, spot, horizontal, vertical):
            ends = f'x1="{bar.left:.1f}" y1="{bar.top:.1f}" x2="{bar.right:.1f}" y2="{bar.bottom:.1f}"'
            parts.append(f'<line {ends} stroke="{colour}"/>')
        parts.append(f'<circle cx="{spot[0]:.1f}" cy="{spot[1]:.1f}" r="4" fill="{colour}"/>')
    corner = Box(WIDTH - RIGHT, 0, WIDTH, TOP + LINE * len(groups) if legend else 0)
    area = Box(LEFT, TOP - LINE, WIDTH, HEIGHT - BOTTOM)
    thick = [Box(bar.left - 1, bar.top - 1, bar.right + 1, bar.bottom + 1) for bar in bars]
    labels = place_labels([p.name for p in points], spots, thick, area, corner)
    for label, spot, colour in zip(labels, spots, colours, strict=True):
        if label.far_from(spot):
            end = f'x2="{label.x:.1f}" y2="{label.y - 4:.1f}"'
            parts.append(
                f'<line x1="{spot[0]:.1f}" y1="{spot[1]:.1f}" {end} stroke="{colour}" stroke-width="0.5"/>'
            )
        parts.append(_text(label.x, label.y, label.text, label.anchor, colour))
    return _document(parts, title)


def _x_axis(points: Sequence[Point], scale: Scale) -> _Axis:
    high = max(p.x + p.x_error for p in points)
    if scale == "zero":
        return _Axis(0.0, 1.05 * high, LEFT, WIDTH - RIGHT)
    low = min(p.x - p.x_error for p in points)
    if scale == "log":
        return _Axis(low / 1.1, 1.1 * high, LEFT, WIDTH - RIGHT, logarithmic=True)
    room = max(0.08 * (high - low), 0.01 * high)
    return _Axis(max(0.0, low - room), high + room, LEFT, WIDTH - RIGHT)


def _bars(point: Point, spot: tuple[float, float], horizontal: _Axis, vertical: _Axis) -> list[Box]:
    """The error bars of a point, as boxes without width."""
    bars = []
    if point.error:
        top, bottom = (
            vertical.at(point.y + point.error),
            vertical.at(max(point.y - point.error, vertical.low)),
        )
        bars.append(Box(spot[0], top, spot[0], bottom))
    if point.x_error:
        left = horizontal.at(max(point.x - point.x_error, horizontal.low))
        bars.append(Box(left, spot[1], horizontal.at(point.x + point.x_error), spot[1]))
    return bars


def _legend(groups: Sequence[str]) -> list[str]:
    """The names of the colours, at the top right."""
    return [
        _text(WIDTH - RIGHT + 8, TOP + LINE * number, group, colour=COLOURS[number % len(COLOURS)])
        for number, group in enumerate(groups)
    ]


def lines(curves: Sequence[Curve], title: str, x: str, y: str) -> str:
    """Curves over their positions from 1, each name at its end."""
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if not values:
        return _document([_text(WIDTH / 2, HEIGHT / 2, "nothing was trained", "middle")], title)
    longest = max(len(curve.values) for curve in curves)
    horizontal = _Axis(1.0, float(max(2, longest)), LEFT, WIDTH - RIGHT)
    low, high = min(*values, 0.0), max(values)
    vertical = _Axis(low, high * 1.05 if high > low else low + 1.0, HEIGHT - BOTTOM, TOP)
    parts = _frame(horizontal, vertical, x, y)
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        spots = [
            (horizontal.at(i), vertical.at(value))
            for i, value in enumerate(curve.values, start=1)
            if math.isfinite(value)
        ]
        if spots:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(_text(WIDTH - RIGHT + 8, TOP + 14 * (number + 1), curve.name, colour=colour))
    return _document(parts, title)


def _frame(horizontal: _Axis, vertical: _Axis, x: str, y: str) -> list[str]:
    """Axes with ticks and their names."""
    left, right, bottom, top = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    parts = [f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" fill="none" stroke="#222"/>']
    for value in horizontal.ticks():
        parts.append(_text(horizontal.at(value), bottom + 18, f"{value:.3g}", "middle"))
    for value in vertical.ticks():
        at = vertical.at(value)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 6, at + 4, f"{value:.3g}", "end"))
    parts.append(_text((left + right) / 2, HEIGHT - 12, x, "middle"))
    parts.append(_text(left, top - 10, y))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _document(parts: Sequence[str], title: str) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    name = f'<text x="{LEFT}" y="18" font-size="14" fill="#222">{escape(title)}</text>'
    return "\n".join([head, ground, name, *parts, "</svg>"]) + "\n"


def stack(charts: Sequence[str]) -> str:
    """Charts one under the other in one picture."""
    if len(charts) == 1:
        return charts[0]
    inner = [chart.replace("<svg ", f'<svg y="{i * HEIGHT}" ', 1) for i, chart in enumerate(charts)]
    height = HEIGHT * len(charts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">'
    return "\n".join([head, *inner, "</svg>"]) + "\n"
