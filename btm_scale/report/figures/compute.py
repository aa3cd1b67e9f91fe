"""Training compute by method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, KINDS, kind, label
from btm_scale.report.figures.style import ACCENT, INK, SOFT, WIDE, figure, is_narrow, literal
from btm_scale.report.summary import flops_text, tokens_text
from btm_scale.run_dir import SEED


@dataclass(frozen=True)
class Bar:
    """A bar: its methods, their FLOPs and tokens each, and the FLOPs of the seed LM among them."""

    name: str
    methods: tuple[str, ...]
    flops: float
    tokens: int
    seed: float


def compute_bars(results: Results) -> list[Bar]:
    """Return a bar for each method; methods of one kind with the same compute share a bar."""
    spent = results.compute
    seed = spent[SEED].flops if SEED in spent else 0.0
    groups: dict[tuple[str, int, float], list[str]] = {}
    order = list(KINDS)
    for method in sorted(spent, key=lambda m: (order.index(kind(m)), m != SEED)):
        own = kind(method) if kind(method) in ("expert", "average") else method
        groups.setdefault((own, spent[method].tokens, spent[method].flops), []).append(method)
    bars = []
    for (own, tokens, flops), methods in groups.items():
        name = label(methods[0]) if own != "expert" else f"Expert {label(methods[0])}"
        if len(methods) > 1:
            name = f"Each of {len(methods)} {own}s"
        bars.append(Bar(name, tuple(methods), flops, tokens, min(seed, flops)))
    return bars


def compute(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw the training FLOPs of every method, the seed LM's part lighter."""
    bars, narrow = compute_bars(results), is_narrow(width)
    places = list(range(len(bars)))
    colours = [ACCENT if ENSEMBLE in bar.methods else SOFT for bar in bars]
    finite = [bar.flops if math.isfinite(bar.flops) else 0.0 for bar in bars]
    seeds = [min(bar.seed, flops) for bar, flops in zip(bars, finite, strict=True)]
    words = [f"{flops_text(bar.flops)}, {tokens_text(bar.tokens)} tokens" for bar in bars]
    hover = [f"<b>{literal(bar.name)}</b><br>{text}" for bar, text in zip(bars, words, strict=True)]
    common = {
        "y": places,
        "orientation": "h",
        "width": 0.42 if narrow else 0.62,
        "hovertext": hover,
        "hoverinfo": "text",
    }
    parts = [
        go.Bar(common, x=seeds, name="seed LM", marker={"color": colours, "opacity": 0.45, "line": {"width": 0}}),
        go.Bar(
            common,
            x=[flops - seed for flops, seed in zip(finite, seeds, strict=True)],
            name="after the seed LM",
            marker={"color": colours, "line": {"width": 0}},
        ),
    ]
    names = [literal(bar.name, 30) for bar in bars]
    ends = [
        {"x": flops, "y": i, "xanchor": "left", "xshift": 6, "text": text}
        for i, (flops, text) in enumerate(zip(finite, words, strict=True))
    ]
    # A phone has no room for names beside the bars.
    above = [{"x": 0, "y": i - 0.42, "xanchor": "left", "text": f"{name}"} for i, name in enumerate(names)]
    return figure(
        parts,
        width,
        (46 if narrow else 30) * len(bars) + 20,
        barmode="stack",
        xaxis={"visible": False, "fixedrange": True, "range": [0, (max([*finite, 0.0]) or 1.0) * 1.02]},
        yaxis={
            "range": [len(bars) - 0.5, -0.7],
            "tickvals": places,
            "ticktext": names,
            "showticklabels": not narrow,
            "showgrid": False,
            "fixedrange": True,
            "tickfont": {"size": 13, "color": INK},
        },
        annotations=[*ends, *(above if narrow else ())],
        margin={"r": 170, "t": 4, "b": 4},
        showlegend=False,
        dragmode=False,
    )
