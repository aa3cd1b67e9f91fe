"""The figure of README.md: perplexity relative to the dense baseline, an SVG that needs no plotting library.

It has its own light background, so that it is readable on a dark page too.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from doc_tables import SHORT_LABELS, study_ratios

_WIDTH, _ROW, _TOP, _BOTTOM = 880, 38, 62, 58
_LEFT, _RIGHT = 312, 30  # margins of the plot area
_LOW, _HIGH = 0.8, 1.45
PAPER, INK, SOFT, GRID = "#fdfcf9", "#1c1e21", "#5d636b", "#e6e3db"
_SERIES = (("8 trained domains", "#0b5fa5", -6), ("3 novel domains", "#b8500c", 6))


def perplexity_figure() -> str:
    """Return the SVG: one row per method, a dot per random seed, a bar at the mean of the seeds."""
    ratios = study_ratios()
    height = _TOP + _ROW * len(SHORT_LABELS) + _BOTTOM
    bottom = height - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">',
        "<title>Perplexity of each method relative to the dense baseline</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        *_legend(),
    ]
    for tick in range(8, 15):
        x = _x(tick / 10)
        parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(label(x, bottom + 20, f"{tick / 10:.1f}", SOFT, "middle"))
    dense = _x(1)
    parts.append(f'<line x1="{dense}" y1="{_TOP}" x2="{dense}" y2="{bottom}" stroke="{INK}" stroke-dasharray="4 3"/>')
    axis = "perplexity / perplexity of the dense baseline (lower is better)"
    parts.append(label((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 42, axis, SOFT, "middle"))
    for row, (method, name) in enumerate(SHORT_LABELS.items()):
        y = _TOP + _ROW * (row + 0.5)
        parts.append(label(_LEFT - 16, y + 5, name, INK, "end"))
        for (_, colour, offset), values in zip(_SERIES, ratios[method], strict=True):
            parts += _dots(values, y + offset, colour)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts = []
    for index, (name, colour, _) in enumerate(_SERIES):
        x = 30 + 180 * index
        parts.append(f'<circle cx="{x}" cy="32" r="5" fill="{colour}"/>')
        parts.append(label(x + 12, 37, name, INK, "start"))
    return [*parts, label(_WIDTH - _RIGHT, 37, "dot: one random seed, bar: their mean", SOFT, "end")]


def _dots(values: Sequence[float], y: float, colour: str) -> list[str]:
    centre = _x(mean(values))
    bar = f'<line x1="{centre}" y1="{y - 6}" x2="{centre}" y2="{y + 6}" stroke="{colour}" stroke-width="3"/>'
    dots = [f'<circle cx="{_x(value)}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.45"/>' for value in values]
    return [bar, *dots]


def _x(ratio: float) -> float:
    return round(_LEFT + (ratio - _LOW) / (_HIGH - _LOW) * (_WIDTH - _LEFT - _RIGHT), 1)


def label(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    """Return a line of text; `anchor` is the side of it that is at x."""
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{text}</text>'
