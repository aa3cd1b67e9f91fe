"""Methods against a reference, by domain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT, POSTERIOR_AVERAGE
from btm_scale.report.figures.style import (
    ACCENT,
    BELOW,
    COLOURS,
    FAINT,
    INK,
    PAPER,
    SOFT,
    WIDE,
    figure,
    is_narrow,
    literal,
    rule,
)
from btm_scale.report.summary import mean, novel_domains, perplexity, ratio, reference, share_text, training_domains
from btm_scale.run_dir import SEED

# Each series with its method, its mark, which reads without its colour, and its place in a row, in rows: marks of
# equal ratios would cover each other. A dot within a ring hides nothing. The own expert's method is the row's.
_SERIES: dict[str, tuple[str, dict[str, Any], float]] = {
    "Ensemble": (ENSEMBLE, {"symbol": "circle", "size": 10, "color": ACCENT}, 0.0),
    "Own expert": ("", {"symbol": "circle-open", "size": 14, "color": COLOURS["c1"], "line": {"width": 2.4}}, 0.0),
    "Posterior average": (POSTERIOR_AVERAGE, {"symbol": "diamond", "size": 11, "color": COLOURS["c2"]}, 0.2),
    "Random split": ("random-split", {"symbol": "x-thin", "line": {"width": 2.6, "color": COLOURS["c3"]}}, -0.2),
    "Seed LM": (SEED, {"symbol": "square", "size": 9, "color": SOFT}, 0.0),
}
# Beyond this a mark is outside of the plot, with its number at the edge: one ruined average must not squeeze the rest.
_FARTHEST = 2.0


@dataclass(frozen=True)
class RatioRow:
    """A row of the chart: its name, the reference's perplexity, and each series' ratio to it and perplexity."""

    name: str
    reference: float
    is_mean: bool
    ratios: dict[str, float] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)


def ratio_rows(results: Results, to: str) -> list[RatioRow]:
    """Return the mean, the training domains, the novel mean and the novel domains, as far as `to` has them."""
    rows: list[RatioRow] = []
    for domains, name in ((training_domains(results), "Mean"), (novel_domains(results), "Mean, novel")):
        means = [(name, domains)] if len(domains) > 1 else []
        for row_name, members in [*means, *((domain, [domain]) for domain in domains)]:
            below = mean(results, to, members)
            if below is None:
                continue
            row = RatioRow(row_name, below.value, len(members) > 1)
            for series, (method, _, _) in _SERIES.items():
                method = method or f"{EXPERT}{row_name}"
                against, own = ratio(results, method, to, members), mean(results, method, members)
                if method != to and against is not None and own is not None and not against.partial:
                    row.ratios[series], row.perplexities[series] = against.value, own.value
            rows.append(row)
    return rows


def perplexity_ratios(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw each method's perplexity divided by that of dense (without dense, of the seed LM), by domain."""
    to, narrow = reference(results) or SEED, is_narrow(width)
    rows = ratio_rows(results, to)
    low, high = _range(rows, 0.04 if narrow else 0.015)
    traces = []
    for series, (_, mark, lane) in _SERIES.items():
        shown = [(i, row) for i, row in enumerate(rows) if series in row.ratios]
        numbers = [f"{perplexity(r.perplexities[series])}, {share_text(r.ratios[series])} of {to}" for _, r in shown]
        texts = [f"<b>{literal(r.name)}</b><br>{series}: {text}" for (_, r), text in zip(shown, numbers, strict=True)]
        places = {"x": [row.ratios[series] for _, row in shown], "y": [i + lane for i, _ in shown]}
        marker = {"line": {"width": 1.2, "color": PAPER}, "size": 8} | mark
        points = {"mode": "markers", "name": series, "marker": marker, "hovertext": texts, "hoverinfo": "text"}
        traces += [go.Scatter(places | points)] if shown else []
    edge = {"xref": "paper", "x": 1, "xanchor": "right"}
    notes = []
    for i, row in enumerate(rows):
        font = {"weight": 700 if row.is_mean else 400}
        notes.append(edge | {"xshift": 62, "y": i, "text": perplexity(row.reference), "font": font})
        beyond = [f"{name} {share_text(r)} \u203a" for name, r in row.ratios.items() if not low <= r <= high]
        if beyond:
            notes.append(edge | {"y": i + 0.3, "text": ", ".join(beyond), "font": {"size": 11, "color": SOFT}})
    top = {"yref": "paper", "y": 1, "yanchor": "bottom", "font": {"color": SOFT}}
    notes.append(top | edge | {"xshift": 62, "yshift": 22, "text": f"{to}'s<br>perplexity", "align": "right"})
    if low < 0.93:
        notes.append(top | {"x": 0, "xanchor": "right", "xshift": -8, "yshift": 24, "text": "\u2190 better"})
    better = {"type": "rect", "x0": low / 2, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
    better |= {"fillcolor": ACCENT, "opacity": 0.05, "layer": "below"}
    rules = [rule(y=i + 0.5, colour=FAINT, x1=1.07) for i in range(len(rows))]
    across = {"type": "log", "side": "top", "nticks": 5 if narrow else 10, "range": [math.log10(low), math.log10(high)]}
    names = [literal(row.name, 12 if narrow else 22) for row in rows]
    texts = [f"<b>{name}</b>" if row.is_mean else name for name, row in zip(names, rows, strict=True)]
    down = {"range": [len(rows) - 0.5, -0.5], "tickvals": list(range(len(rows))), "ticktext": texts}
    down |= {"tickfont": {"size": 13, "color": INK}, "showgrid": False, "fixedrange": True}
    layout = {"annotations": notes, "xaxis": across | {"tickformat": "~g"}, "yaxis": down, "showlegend": True}
    layout["shapes"] = [better, *rules, rule(x=1)]
    layout["legend"] = BELOW if narrow else BELOW | {"y": 1, "yanchor": "top"}
    layout["margin"] = {"t": 60 if narrow else 84, "b": 66 if narrow else 8, "r": 64}
    height = (42 if len(rows) <= 24 else 28) * len(rows) + (132 if narrow else 96)
    return figure(traces, width, height, **layout)


def _range(rows: list[RatioRow], margin: float) -> tuple[float, float]:
    ratios = [value for row in rows for value in row.ratios.values()]
    inside = [1.0, *(value for value in ratios if 1 / _FARTHEST <= value <= _FARTHEST)]
    low, high = min(0.97, min(inside) * (1 - margin)), max(1.03, max(inside) * (1 + margin))
    return low, high if all(value <= high for value in ratios) else high * 1.12
