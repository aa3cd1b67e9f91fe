"""Measured perplexities of weighted averages over those that the laws predict, and the chosen mixture."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from btm_scale.evaluate.mixture_record import ChosenMixture
from btm_scale.report.figures.style import BELOW, INK, PAPER, SOFT, WIDE, expert_lines, figure, is_narrow, literal
from btm_scale.report.summary import perplexity

_MARGIN = 1.04


def mixture_fit(chosen: ChosenMixture, *, width: int = WIDE) -> go.Figure:
    """Draw measured over predicted perplexity, relative to the seed LM's, or without a seed to the uniform average's.

    The prediction for a measured average is that of the law fitted to all others. A star is the average with the
    chosen weights.
    """
    narrow = is_narrow(width)
    colours = {name: line["color"] for name, line in expert_lines(list(chosen.perplexity)).items()}
    traces, ends = [], [1.0]
    for name, optimum in chosen.perplexity.items():
        to = optimum.seed or optimum.uniform
        predicted = [one.predicted[name] / to for one in chosen.measured]
        measured = [one.perplexity[name] / to for one in chosen.measured]
        words = [
            f"<b>{literal(name)}</b><br>{literal(_weights(one.weights))}<br>"
            f"measured {perplexity(one.perplexity[name])}, predicted {perplexity(one.predicted[name])}"
            for one in chosen.measured
        ]
        marker = {"color": colours[name], "size": 7, "opacity": 0.75, "line": {"width": 0.8, "color": PAPER}}
        points = {"x": predicted, "y": measured, "mode": "markers", "name": literal(name, 24), "legendgroup": name}
        traces.append(go.Scatter(points, marker=marker, hovertext=words, hoverinfo="text"))
        traces.append(_star(chosen, name, to, colours[name]))
        ends += [*predicted, *measured, *(end / to for end in optimum.interval)]
    low, high = min(ends) / _MARGIN, max(ends) * _MARGIN
    diagonal = {"x": [low, high], "y": [low, high], "mode": "lines", "line": {"color": SOFT, "width": 1, "dash": "dot"}}
    traces.insert(0, go.Scatter(diagonal, hoverinfo="skip", showlegend=False))
    reference = "seed's" if all(one.seed for one in chosen.perplexity.values()) else "uniform average's"
    scale = {"type": "log", "range": [math.log10(low), math.log10(high)], "tickformat": "~g", "nticks": 6}
    layout = {
        "xaxis": scale | {"title": {"text": f"predicted, \u00f7 the {reference}"}},
        "yaxis": scale | {"title": {"text": f"measured, \u00f7 the {reference}"}},
        "legend": BELOW,
        "showlegend": True,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 96 if narrow else 72},
    }
    return figure(traces, width, 420 if narrow else 520, **layout)


def _star(chosen: ChosenMixture, name: str, to: float, colour: str) -> go.Scatter:
    optimum = chosen.perplexity[name]
    at, (low, high) = optimum.predicted / to, optimum.interval
    words = f"<b>{literal(name)}</b><br>chosen average: predicted {perplexity(optimum.predicted)}, "
    words += f"{perplexity(low)} to {perplexity(high)}"
    bars = {"type": "data", "symmetric": False, "array": [high / to - at], "arrayminus": [at - low / to]}
    bars |= {"color": colour, "thickness": 1.5, "width": 5}
    marker = {"symbol": "star", "size": 15, "color": colour, "line": {"width": 1, "color": INK}}
    point = {"x": [at], "y": [at], "error_y": bars, "mode": "markers", "marker": marker, "legendgroup": name}
    return go.Scatter(point, hovertext=[words], hoverinfo="text", showlegend=False)


def _weights(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
