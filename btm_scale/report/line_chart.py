"""Training curves: smoothed lines over their raw values, named at their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.report.charts import (
    Scale,
    drawing,
    element,
    fit,
    line,
    linear,
    round_ticks,
    spread,
    text,
    text_width,
    tooltip,
)

_MOST_POINTS = 240
_PITCH = 16.0


@dataclass(frozen=True)
class Curve:
    """A curve: x and y [points]; `style` is a CSS class."""

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str


def smoothed(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred moving mean [points] over a share of the points; at the ends the window is cut."""
    half = max(0, round(len(values) * share / 2))
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (total[last + 1] - total[first]) / (last - first + 1)


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int,
    boundary: float | None = None,
) -> str:
    """Curves over a share in 0..1 of something; `boundary` is marked by a vertical line.

    The vertical range leaves out the steep first tenth, where it would press everything else flat.
    """
    narrow = width < 600
    right = min(96.0 if narrow else 170.0, 26 + max([30.0, *(text_width(curve.name, 12) for curve in curves)]))
    height = max(280.0 if narrow else 380.0, _PITCH * len(curves) + 60)
    left, top, bottom = 34.0, 24.0, height - 40
    smooth = [smoothed(curve.y) for curve in curves]
    low, high = _range(curves, smooth)
    across, down = linear(0, 1, left, width - right), linear(low, high, bottom, top)

    frame = [text(0, 12, y_label, class_="hint")]
    for tick in round_ticks(low, high, 6):
        frame.append(line(left, down(tick), width - right, down(tick), class_="grid"))
        frame.append(text(left - 8, down(tick) + 4, f"{tick:g}", class_="tick", text_anchor="end"))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        frame.append(text(across(tick), bottom + 18, f"{tick:.0%}", class_="tick", text_anchor="middle"))
    frame.append(line(left, bottom, width - right, bottom, class_="axis"))
    frame.append(text((left + width - right) / 2, height - 4, x_label, class_="hint", text_anchor="middle"))
    if boundary is not None:
        frame.append(line(across(boundary), top, across(boundary), bottom, class_="boundary"))
        if not narrow:
            frame.append(text(across(boundary) - 8, top + 10, "seed", class_="hint", text_anchor="end"))
        frame.append(text(across(boundary) + 8, top + 10, "branch", class_="hint"))

    # An inner svg cuts off what leaves the axes, and needs no id as a clip path would.
    raw = [_path(curve.x, curve.y, across, down, f"raw {curve.style}") for curve in curves]
    lines = [
        _path(curve.x, values, across, down, f"curve {curve.style}", tooltip(f"{curve.name}: {values[-1]:.3f}"))
        for curve, values in zip(curves, smooth, strict=True)
    ]
    box = f"{left} {top} {width - right - left} {bottom - top}"
    plot = element("svg", *raw, *lines, x=left, y=top, width=width - right - left, height=bottom - top, viewBox=box)

    named = [(curve, values) for curve, values in zip(curves, smooth, strict=True) if curve.x[-1] > 0.97]
    ends = [min(bottom, max(top, down(float(values[-1])))) for _, values in named]
    labels = []
    for (curve, _), end, y in zip(named, ends, spread(ends, _PITCH, top, bottom), strict=True):
        x = across(float(curve.x[-1]))
        points = f"{x:.1f},{end:.1f} {x + 8:.1f},{y:.1f} {x + 16:.1f},{y:.1f}"
        name = text(x + 20, y + 4, fit(curve.name, right - 24, 12), class_=f"end {curve.style}")
        leader = element("polyline", points=points, class_=f"leader {curve.style}")
        labels.append(element("g", tooltip(curve.name), leader, name))
    return drawing(width, height, title, *frame, plot, *labels)


def _range(curves: Sequence[Curve], smooth: Sequence[np.ndarray]) -> tuple[float, float]:
    settled = [values[curve.x >= 0.1] for curve, values in zip(curves, smooth, strict=True)]
    values = np.concatenate([*settled, np.empty(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = max(0.05, 0.06 * (high - low))
    return max(0.0, low - margin), high + margin


def _path(x: np.ndarray, y: np.ndarray, across: Scale, down: Scale, style: str, *children: str) -> str:
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) > _MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(x) - 1, _MOST_POINTS).astype(int))
        x, y = x[chosen], y[chosen]
    points = " ".join(f"{across(float(a)):.1f},{down(float(b)):.1f}" for a, b in zip(x, y, strict=True))
    return element("polyline", *children, points=points, class_=style)
