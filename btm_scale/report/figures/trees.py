"""Who came from whom: a run as one picture, and the lineage of a forest that grew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT
from btm_scale.report.figures.style import ACCENT, INK, PAPER, SOFT, WIDE, expert_lines, figure, is_narrow, literal
from btm_scale.report.summary import experts, mean, perplexity, training_domains, value
from btm_scale.run_dir import DENSE, SEED

Lineage = Mapping[str, Mapping[str, float]]

_TRUNK, _THICKEST = 7.0, 6.0


def forest(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw seed LM to experts to ensemble, with dense below if there is one, and their mean perplexities."""
    names, narrow = experts(results), is_narrow(width)
    lines, count = expert_lines(names), max(1, len(names))
    pitch = 24.0 if count <= 10 else 17.0 if count <= 32 else 13.0
    low = count * pitch + 28  # where dense is
    middle = count * pitch / 2
    fork, join, bend = (0.24, 0.78, 0.13) if narrow else (0.22, 0.80, 0.13)
    traces = [_path([0, fork], [middle, middle], {"color": SOFT, "width": _TRUNK}, _said(results, SEED))]
    labels = [
        _name(0, middle - 18, "<b>seed</b>", "left"),
        _name(0, middle + 18, _mean_of(results, SEED), "left", SOFT),
    ]
    for i, name in enumerate(names):
        y = (i + 0.5) * pitch
        out, back = _bend(fork, middle, fork + bend, y), _bend(join - bend, y, join, middle)
        level = np.linspace(fork + bend, join - bend, 12)
        x, heights = np.concatenate([out[0], level, back[0]]), np.concatenate([out[1], np.full(12, y), back[1]])
        own = value(results, f"{EXPERT}{name}", name)
        words = f"<b>{literal(name)}</b>" + (f"<br>{perplexity(own)} on its own domain" if own is not None else "")
        traces.append(_path(x, heights, {"color": lines[name]["color"], "width": max(1.6, _TRUNK / count)}, words))
        short = literal(name, 12 if narrow else 34)
        labels.append(_name((fork + join) / 2, y, short, "center", size=12.5 if pitch > 13 else 10.5))
        labels[-1]["borderpad"] = 2 if pitch > 13 else 0
    if DENSE in results.methods:
        x, heights = _bend(fork, middle, fork + bend, low)
        dense = {"color": INK, "width": _TRUNK}
        traces.append(_path([*x, 0.6, 0.8, 1], [*heights, low, low, low], dense, _said(results, DENSE)))
        labels.append(_name((fork + bend + 1) / 2, low, "<b>dense</b>", "center"))
        labels.append(_name(1, low + 18, _mean_of(results, DENSE), "right", SOFT))
    traces.append(_path([join, 1], [middle, middle], {"color": ACCENT, "width": _TRUNK}, _said(results, ENSEMBLE)))
    labels.append(_name(1, middle - 18, "<b>ensemble</b>", "right"))
    labels.append(_name(1, middle + 18, _mean_of(results, ENSEMBLE), "right", SOFT))
    height = max(count * pitch, middle + 34) + (56 if DENSE in results.methods else 0)
    return _drawing(traces, labels, width, height)


def lineage(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw a line from each parent to what began with it, as thick as the parent's weight."""
    parents, lines = results.lineage, expert_lines(experts(results))
    column = generations(parents)
    columns = [[name for name in parents if column[name] == n] for n in range(max(column.values(), default=-1) + 1)]
    pitch, room = 30.0, 1 / max(1, len(columns))
    height = pitch * max(map(len, columns), default=1)
    place = {
        name: (room * (n + 0.5), height / 2 + pitch * (i - (len(names) - 1) / 2))
        for n, names in enumerate(columns)
        for i, name in enumerate(names)
    }
    traces = [
        _path(
            *_bend(*place[parent], *place[name]),
            {"color": lines.get(name, {"color": SOFT})["color"], "width": max(1.0, _THICKEST * weight)},
            f"{literal(name)} began with {weight:.0%} of {literal(parent)}",
        )
        for name, weights in parents.items()
        for parent, weight in weights.items()
        if parent in place
    ]
    length = round(room * width * 0.6 / 7)
    labels = [_name(x, y, f"<b>{literal(name, length)}</b>", "center") for name, (x, y) in place.items()]
    return _drawing(traces, labels, width, height)


def generations(lineage: Lineage) -> dict[str, int]:
    """How many steps each model is from one without parents, by its longest way; parents are before children."""
    steps: dict[str, int] = {}
    for name, parents in lineage.items():
        steps[name] = 1 + max((steps.get(parent, 0) for parent in parents), default=-1)
    return steps


def is_worth_drawing(lineage: Lineage) -> bool:
    """Whether any model has other parents than the seed LM alone."""
    return any(parents and set(parents) != {SEED} for parents in lineage.values())


def _mean_of(results: Results, method: str) -> str:
    over = mean(results, method, training_domains(results))
    return "" if over is None or over.partial else perplexity(over.value)


def _said(results: Results, method: str) -> str:
    return f"<b>{method}</b><br>mean perplexity {_mean_of(results, method) or 'unknown'}"


def _bend(x: float, y: float, to_x: float, to_y: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve that leaves and arrives level: a Bezier curve with level handles."""
    t, handle = np.linspace(0, 1, 24), 0.62 * (to_x - x)
    across = x + (to_x - x) * t * t * (3 - 2 * t) + 3 * handle * t * (1 - t) * (1 - 2 * t)
    return across, y + (to_y - y) * t * t * (3 - 2 * t)


def _path(x: Any, y: Any, line: dict[str, Any], words: str) -> go.Scatter:
    points = {"x": np.asarray(x, dtype=np.float32), "y": np.asarray(y, dtype=np.float32)}
    return go.Scatter(points, mode="lines", line=line, hovertext=words, hoverinfo="text", showlegend=False)


def _name(x: float, y: float, text: str, side: str, colour: str = INK, size: float = 12.5) -> dict[str, Any]:
    # The paper behind the words interrupts the line, so that it runs into its name and out of it.
    paper = {"bgcolor": PAPER, "borderpad": 2} if side == "center" else {}
    return {"x": x, "y": y, "text": text, "xanchor": side, "font": {"color": colour, "size": size}} | paper


def _drawing(traces: list[go.Scatter], labels: list[dict[str, Any]], width: int, height: float) -> go.Figure:
    across, down = ({"range": ends, "visible": False, "fixedrange": True} for ends in ([0, 1], [height, 0]))
    layout = {"xaxis": across, "yaxis": down, "dragmode": False, "margin": {"l": 0, "r": 0, "t": 4, "b": 4, "pad": 0}}
    return figure(traces, width, height + 8, annotations=[label for label in labels if label["text"]], **layout)
