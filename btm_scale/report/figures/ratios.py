"""Methods against a reference, by domain."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT, POSTERIOR_AVERAGE
from btm_scale.report.figures.style import ACCENT, FAINT, PALETTE, PAPER, SOFT, WIDE, figure, is_narrow, literal
from btm_scale.report.summary import mean, novel_domains, perplexity, ratio, reference, share_text, training_domains
from btm_scale.run_dir import SEED

OWN_EXPERT = "Own expert"
# Each series with its method, its mark, which reads without its colour, and its place in a row, in rows: marks of
# equal ratios would cover each other. A dot within a ring hides nothing.
_SERIES = {
    "Ensemble": (ENSEMBLE, {"symbol": "circle", "size": 10, "color": ACCENT}, 0.0),
    OWN_EXPERT: ("", {"symbol": "circle-open", "size": 14, "color": PALETTE["c1"][0], "line": {"width": 2.4}}, 0.0),
    "Posterior average": (POSTERIOR_AVERAGE, {"symbol": "diamond", "size": 11, "color": PALETTE["c2"][0]}, -0.2),
    "Random split": (
        "random-split",
        {"symbol": "x-thin", "size": 8, "line": {"width": 2.6, "color": PALETTE["c3"][0]}},
        0.2,
    ),
    "Seed LM": (SEED, {"symbol": "square", "size": 9, "color": SOFT}, 0.0),
}
# Beyond this a mark is outside of the plot, with its number at the edge: one ruined average must not squeeze the rest.
_FARTHEST = 2.0


@dataclass(frozen=True)
class RatioRow:
    """A row of the chart: its name, the reference's perplexity, and each series' ratio to it and perplexity."""

    name: str
    reference: float
    ratios: dict[str, float] = field(default_factory=dict)
    perplexities: dict[str, float] = field(default_factory=dict)
    is_mean: bool = False


def ratio_rows(results: Results, to: str) -> list[RatioRow]:
    """Return the mean, the training domains, the novel mean and the novel domains, as far as `to` has them."""
    rows: list[RatioRow] = []
    for domains, name in ((training_domains(results), "Mean"), (novel_domains(results), "Mean, novel")):
        members = [(name, domains)] if len(domains) > 1 else []
        for row_name, group in [*members, *((domain, [domain]) for domain in domains)]:
            below = mean(results, to, group)
            if below is None:
                continue
            row = RatioRow(row_name, below.value, is_mean=len(group) > 1)
            for series, (method, _, _) in _SERIES.items():
                method = method or f"{EXPERT}{row_name}"
                against, own = ratio(results, method, to, group), mean(results, method, group)
                if method != to and against is not None and own is not None and not against.partial:
                    row.ratios[series], row.perplexities[series] = against.value, own.value
            rows.append(row)
    return rows


def perplexity_ratios(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw each method's perplexity divided by that of dense (without dense, of the seed LM), by domain."""
    to = reference(results) or SEED
    rows, narrow = ratio_rows(results, to), is_narrow(width)
    low, high = _range(rows, 0.04 if narrow else 0.015)
    traces = []
    for series, (_, mark, lane) in _SERIES.items():
        shown = [(i, row) for i, row in enumerate(rows) if series in row.ratios]
        texts = [
            f"<b>{literal(row.name)}</b><br>{series}: {perplexity(row.perplexities[series])}, "
            f"{share_text(row.ratios[series])} of {literal(to)}"
            for _, row in shown
        ]
        outline = {"line": {"width": 1.2, "color": PAPER}} | mark
        marks = {"x": [row.ratios[series] for _, row in shown], "y": [i - lane for i, _ in shown]}
        hover = {"hovertext": texts, "hoverinfo": "text"}
        if shown:
            traces.append(go.Scatter(marks, mode="markers", name=series, marker=outline, cliponaxis=True, **hover))
    # A ring is drawn around its dot, not over it.
    names = [literal(row.name, 12 if narrow else 22) for row in rows]
    names = [f"<b>{name}</b>" if row.is_mean else name for name, row in zip(names, rows, strict=True)]
    edge = {"xref": "paper", "x": 1, "xanchor": "right"}
    notes = [
        _note(row.reference, i) | {"font": {"size": 12, "weight": 700 if row.is_mean else 400}}
        for i, row in enumerate(rows)
    ]
    for i, row in enumerate(rows):
        beyond = [
            f"{name} {share_text(value)} \u203a" for name, value in row.ratios.items() if not low <= value <= high
        ]
        if beyond:
            notes.append(edge | {"y": i + 0.3, "text": ", ".join(beyond), "font": {"size": 11, "color": SOFT}})
    top = {"yref": "paper", "y": 1, "yanchor": "bottom", "font": {"color": SOFT}}
    notes.append(top | edge | {"xshift": 62, "yshift": 22, "text": f"{literal(to)}'s<br>perplexity", "align": "right"})
    if low < 0.93:
        notes.append(top | {"x": 0, "xanchor": "right", "xshift": -8, "yshift": 24, "text": "\u2190 better"})
    row_height = 40 if len(rows) <= 24 else 28
    legend = {"orientation": "h", "x": 0, "xref": "container", "yref": "container"}
    legend |= {"y": 0, "yanchor": "bottom"} if narrow else {"y": 1, "yanchor": "top"}
    rules = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1.07,
            "y0": i + 0.5,
            "y1": i + 0.5,
            "line": {"color": FAINT, "width": 1},
        }
        for i in range(len(rows))
    ]
    one = {"type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": SOFT, "width": 1}}
    better = {"type": "rect", "x0": low / 2, "x1": 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
    ends = [math.log10(low), math.log10(high)]
    return figure(
        traces,
        width,
        (row_height + (0 if len(rows) > 24 else 2)) * len(rows) + (132 if narrow else 96),
        xaxis={"type": "log", "side": "top", "range": ends, "nticks": 5 if narrow else 10, "tickformat": "~g"},
        yaxis={
            "range": [len(rows) - 0.5, -0.5],
            "tickvals": list(range(len(rows))),
            "ticktext": names,
            "tickfont": {"size": 13, "color": PALETTE["ink"][0]},
            "showgrid": False,
            "fixedrange": True,
        },
        shapes=[better | {"fillcolor": ACCENT, "opacity": 0.05, "layer": "below"}, *rules, one | {"layer": "below"}],
        annotations=notes,
        legend=legend,
        showlegend=True,
        margin={"t": 60 if narrow else 84, "b": 66 if narrow else 8, "r": 64},
    )


def _note(value: float, row: int) -> dict[str, object]:
    return {"xref": "paper", "x": 1, "xanchor": "right", "xshift": 62, "y": row, "text": perplexity(value)}


def _range(rows: list[RatioRow], margin: float) -> tuple[float, float]:
    ratios = [value for row in rows for value in row.ratios.values()]
    inside = [1.0, *(value for value in ratios if 1 / _FARTHEST <= value <= _FARTHEST)]
    low, high = min(0.97, min(inside) * (1 - margin)), max(1.03, max(inside) * (1 + margin))
    if any(not value <= high for value in ratios):
        high *= 1.12
    return low, high
