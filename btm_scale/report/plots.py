"""Two charts with a row for each thing: methods against a reference by domain, and compute by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_scale.report.charts import (
    Scale,
    drawing,
    element,
    fit,
    line,
    logarithmic,
    rectangle,
    round_ticks,
    text,
    text_width,
    tooltip,
)
from btm_scale.report.summary import share_text

# Beyond this a mark is drawn at the edge with its number: one ruined average must not squeeze all else.
_FARTHEST = 2.0
_LANE = 11.0


@dataclass(frozen=True)
class RatioRow:
    """A row of the ratio chart: what it is about, the reference's figure, each series' ratio and figure."""

    name: str
    reference: str
    ratios: Mapping[str, float]
    figures: Mapping[str, str]
    strong: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar: its length, the part that was done before (drawn lighter), and what to write at its end."""

    name: str
    length: float
    before: float
    figure: str
    style: str = "bar"


def ratio_chart(rows: Sequence[RatioRow], series: Mapping[str, str], reference: str, *, title: str, width: int) -> str:
    """A mark for every series (name -> shape, see `mark`) in every row, by its ratio on a logarithmic axis.

    Marks that would cover each other are moved apart vertically.
    """
    narrow = width < 600
    left = min(96 if narrow else 190, max([40.0, *(text_width(row.name, 13) + 14 for row in rows)]))
    right = 52 if narrow else 78
    low, high = _range([value for row in rows for value in row.ratios.values()])
    scale = logarithmic(low, high, left + 10, width - right - 14)
    body, y = [], 46.0
    for row in rows:
        lanes = _lanes({name: scale(_clip(value, low, high)) for name, value in row.ratios.items()}, series)
        spare = _LANE * max([0, *(abs(lane) for lane in lanes.values())])
        half = 15.0 + max(0.0, spare - 6.0)
        y += half
        strong = " strong" if row.strong else ""
        body.append(line(left, y + half, width, y + half, class_="rule"))
        name = text(0, y + 4.5, fit(row.name, left - 10, 13), class_="label" + strong)
        body.append(element("g", tooltip(row.name), name))
        body.append(text(width, y + 4.5, row.reference, class_="figure" + strong, text_anchor="end"))
        for method in reversed([method for method in series if method in row.ratios]):
            at = y + lanes[method] * _LANE
            body.append(_ratio_mark(row, method, series[method], scale, (low, high), at))
        y += half
    frame = [
        rectangle(left, 38, scale(1) - left, y - 38, class_="better"),
        text(scale(1) - 8, 14, "← better", class_="hint", text_anchor="end") if scale(1) - left > 90 else "",
        text(width, 14, reference.split()[0], class_="hint", text_anchor="end"),
        text(width, 31, "perplexity" if not narrow else "ppl.", class_="hint", text_anchor="end"),
    ]
    for tick in round_ticks(low, high, round((width - left - right) / 75)):
        is_one = abs(tick - 1) < 1e-9
        frame.append(line(scale(tick), 38, scale(tick), y, class_="axis" if is_one else "grid"))
        frame.append(text(scale(tick), 31, f"{tick:g}", class_="tick", text_anchor="middle"))
    return drawing(width, y + 4, title, *frame, *body)


def mark(shape: str, x: float, y: float, *children: str) -> str:
    """A mark of a shape: dot, ring, square, diamond, triangle or cross; each reads without its colour."""
    css = f"mark {shape}"
    if shape in ("dot", "ring"):
        return element("circle", *children, cx=float(x), cy=float(y), r=4.5 if shape == "dot" else 6.6, class_=css)
    outlines = {
        "square": "M-4.3 -4.3h8.6v8.6h-8.6z",
        "diamond": "M0 -6.2L6.2 0L0 6.2L-6.2 0z",
        "triangle": "M0 -5.8L5.6 4.4h-11.2z",
        "cross": "M-4 -4L4 4M-4 4L4 -4",
    }
    return element("path", *children, d=outlines[shape], transform=f"translate({x:.1f} {y:.1f})", class_=css)


def bar_chart(bars: Sequence[Bar], *, title: str, width: int) -> str:
    """Horizontal bars from zero, a figure at the end of each."""
    narrow = width < 600
    left = 0.0 if narrow else min(240.0, max([40.0, *(text_width(bar.name, 13) + 16 for bar in bars)]))
    figures = max([0.0, *(text_width(bar.figure, 12) + 12 for bar in bars)])
    longest = max([bar.length for bar in bars if math.isfinite(bar.length)], default=0.0) or 1.0
    unit = max(40.0, width - left - figures) / longest
    pitch, parts = (44.0 if narrow else 30.0), []
    for i, bar in enumerate(bars):
        top = i * pitch + (18 if narrow else 6)
        length = bar.length * unit if math.isfinite(bar.length) else 0.0
        before = min(bar.before * unit, length)
        baseline = i * pitch + 12 if narrow else top + 13
        parts += [
            element(
                "g",
                tooltip(f"{bar.name}: {bar.figure}"),
                text(0, baseline, fit(bar.name, width if narrow else left - 12, 13), class_="label"),
                rectangle(left, top, before, 18, class_=f"{bar.style} before"),
                rectangle(left + before, top, length - before, 18, class_=bar.style),
                text(left + length + 8, top + 13.5, bar.figure, class_="figure"),
            )
        ]
    parts.append(line(left, 0 if not narrow else 14, left, len(bars) * pitch, class_="axis"))
    return drawing(width, len(bars) * pitch + 2, title, *parts)


def ratio_bar(share: float) -> str:
    """A bar as small as a word: from the middle to the left for a ratio below 1, to the right above."""
    if not (math.isfinite(share) and share > 0):
        return ""
    reach = max(-1.0, min(1.0, math.log(share) / math.log(1.3))) * 30
    style = "down" if reach < 0 else "up"
    box = rectangle(32 + min(0.0, reach), 2, abs(reach), 8, class_=style)
    middle = line(32, 0, 32, 12, class_="axis")
    return element("svg", box, middle, width=64, height=12, viewBox="0 0 64 12", class_="spark", aria_hidden="true")


def _ratio_mark(row: RatioRow, name: str, shape: str, scale: Scale, limits: tuple[float, float], y: float) -> str:
    value = row.ratios[name]
    x = scale(_clip(value, *limits))
    words = tooltip(f"{row.name}, {name}: {row.figures[name]}, {share_text(value)} of the reference")
    drawn = mark(shape, x, y, words)
    if limits[0] <= value <= limits[1]:
        return drawn
    return drawn + text(x - 11, y + 4, f"{share_text(value)} \u203a", class_="beyond", text_anchor="end")


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value)) if math.isfinite(value) else high


def _range(ratios: Sequence[float]) -> tuple[float, float]:
    inside = [
        1.0,
        *(value for value in ratios if math.isfinite(value) and 1 / _FARTHEST <= value <= _FARTHEST),
    ]
    low, high = min(0.97, min(inside) * 0.985), max(1.03, max(inside) * 1.015)
    if any(not math.isfinite(value) or value > high for value in ratios):
        high *= 1.12
    return low, high


def _lanes(positions: Mapping[str, float], series: Mapping[str, str]) -> dict[str, int]:
    lanes: dict[str, int] = {}
    for name in series:
        if name not in positions:
            continue
        for lane in (0, -1, 1, -2, 2, -3, 3):
            beside = [other for other, taken in lanes.items() if taken == lane]
            if not any(_cover(positions[o] - positions[name], series[o], series[name]) for o in beside):
                break
        lanes[name] = lane
    return lanes


def _cover(distance: float, shape: str, other: str) -> bool:
    # A dot within a ring hides nothing.
    return abs(distance) < 14 and {shape, other} != {"dot", "ring"}
