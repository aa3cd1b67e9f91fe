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
    spent, order = results.compute, list(KINDS)
    seed = spent[SEED].flops if SEED in spent else 0.0
    groups: dict[tuple[str, int, float], list[str]] = {}
    for method in sorted(spent, key=lambda m: (order.index(kind(m)), m != SEED)):
        own = kind(method) if kind(method) in ("expert", "average") else method
        groups.setdefault((own, spent[method].tokens, spent[method].flops), []).append(method)
    bars = []
    for (own, tokens, flops), methods in groups.items():
        name = label(methods[0]) if own != "expert" else f"Expert {label(methods[0])}"
        name = name if len(methods) == 1 else f"Each of {len(methods)} {own}s"
        bars.append(Bar(name, tuple(methods), flops, tokens, min(seed, flops)))
    return bars


def compute(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw the training FLOPs of every method, the seed LM's part lighter."""
    bars, narrow = compute_bars(results), is_narrow(width)
    names, places = [literal(bar.name, 30) for bar in bars], list(range(len(bars)))
    total = [bar.flops if math.isfinite(bar.flops) else 0.0 for bar in bars]
    seed = [min(bar.seed, flops) for bar, flops in zip(bars, total, strict=True)]
    after = [flops - before for flops, before in zip(total, seed, strict=True)]
    words = [f"{flops_text(bar.flops)}, {tokens_text(bar.tokens)} tokens" for bar in bars]
    marker = {"color": [ACCENT if ENSEMBLE in bar.methods else SOFT for bar in bars], "line": {"width": 0}}
    common = {"y": places, "orientation": "h", "width": 0.42 if narrow else 0.62, "hoverinfo": "text"}
    common["hovertext"] = [f"<b>{name}</b><br>{text}" for name, text in zip(names, words, strict=True)]
    parts = [
        go.Bar(common, x=seed, name="seed LM", marker=marker | {"opacity": 0.45}),
        go.Bar(common, x=after, name="after the seed LM", marker=marker),
    ]
    notes = [{"x": x, "y": i, "xshift": 6, "text": text} for i, (x, text) in enumerate(zip(total, words, strict=True))]
    # A phone has no room for names beside the bars.
    notes += [{"x": 0, "y": i - 0.46, "text": name} for i, name in enumerate(names)] if narrow else []
    down = {"range": [len(bars) - 0.5, -0.7], "tickvals": places, "ticktext": names, "showticklabels": not narrow}
    down |= {"showgrid": False, "fixedrange": True, "tickfont": {"size": 13, "color": INK}}
    across = {"visible": False, "fixedrange": True, "range": [0, (max([*total, 0.0]) or 1.0) * 1.02]}
    layout = {"barmode": "stack", "xaxis": across, "yaxis": down, "showlegend": False, "dragmode": False}
    layout |= {"annotations": [note | {"xanchor": "left"} for note in notes], "margin": {"r": 170, "t": 4, "b": 4}}
    return figure(parts, width, (46 if narrow else 30) * len(bars) + 20, **layout)
