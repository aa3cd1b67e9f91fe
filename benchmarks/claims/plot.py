"""A plot of methods over the points of a family, an SVG that needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from doc_figure import GRID, INK, PAPER, SOFT, label

from claims.curves import Curve

_WIDTH, _HEIGHT = 880, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 74, 62  # margins of the plot area
_COLOURS = ("#0b5fa5", "#b8500c", "#3f7d20", "#7a3b8f")
_MOST_TICKS, _STEPS = 8, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def plot(
    title: str, axis: str, points: Sequence[str], series: Mapping[str, Mapping[int, Curve]], highest: float
) -> str:
    """Return the SVG of perplexities over that of dense: a dot per random seed, a line through their means.

    The points have equal distances. Values above `highest` are drawn as arrows at the top.
    """
    series = {name: curves for name, curves in series.items() if curves}
    values = [value for curves in series.values() for curve in curves.values() for value in curve.values()]
    low, high = min(values), min(max(values), highest)
    margin = 0.06 * (high - low) or 0.05
    scale = _Scale(len(points), low - margin, high + margin)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">',
        f"<title>{title}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="{PAPER}"/>',
    ]
    for value in _ticks(low - margin, high + margin):
        y = scale.y(value)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" stroke="{GRID}"/>')
        parts.append(label(_LEFT - 10, y + 5, f"{value:.2f}", SOFT, "end"))
    for place, point in enumerate(points):
        parts.append(label(scale.x(place), _HEIGHT - _BOTTOM + 22, point, SOFT, "middle"))
    parts.append(label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 16, axis, SOFT, "middle"))
    for number, (name, curves) in enumerate(series.items()):
        colour = _COLOURS[number]
        parts.append(f'<circle cx="{30 + 200 * number}" cy="32" r="5" fill="{colour}"/>')
        parts.append(label(42 + 200 * number, 37, name, INK, "start"))
        parts += _line(scale, points, curves, colour)
    parts.append(label(_WIDTH - _RIGHT, 37, "dot: one random seed", SOFT, "end"))
    parts.append(label(30, 58, "mean perplexity / that of dense", SOFT, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    """Return at most `_MOST_TICKS` multiples of a round step between two values."""
    step = next((one for one in _STEPS if (high - low) / one < _MOST_TICKS), _STEPS[-1])
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Scale:
    def __init__(self, points: int, low: float, high: float) -> None:
        self._points, self._low, self.high = points, low, high

    def x(self, place: int) -> float:
        """Return the coordinate of a point."""
        return round(_LEFT + (place + 0.5) / self._points * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the coordinate of a value, at most the top."""
        share = (min(value, self.high) - self._low) / (self.high - self._low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _line(scale: _Scale, points: Sequence[str], curves: Mapping[int, Curve], colour: str) -> list[str]:
    parts, means = [], []
    for place, point in enumerate(points):
        values = [curve[point] for curve in curves.values() if point in curve]
        if not values:
            continue
        means.append((scale.x(place), scale.y(mean(values))))
        for value in values:
            x, y = scale.x(place), scale.y(value)
            if value > scale.high:
                parts.append(f'<path d="M{x} {y - 8} l5 9 h-10 z" fill="{colour}" fill-opacity="0.6"/>')
            else:
                parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.45"/>')
    path = " ".join(f"{x},{y}" for x, y in means)
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *parts]
