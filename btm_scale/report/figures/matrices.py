"""Experts against domains: perplexities, and the weights of the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import EXPERT, label
from btm_scale.report.figures.style import COLOURS, INK, PAPER, WIDE, figure, is_narrow, literal, rule
from btm_scale.report.summary import (
    NOTHING,
    experts,
    lowest,
    novel_domains,
    perplexity,
    training_domains,
    value,
    weight_text,
)
from btm_scale.run_dir import DENSE, SEED

FARTHEST = 2.0  # times the best, where a cell has faded to paper
_MOST_NUMBERED = 24  # columns whose numbers fit into their cells
Values = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Matrix:
    """Numbers [rows, columns], None where there is none; which cells are an expert on its own domain or a best."""

    rows: list[str]
    columns: list[str]
    values: Values
    own: set[tuple[int, int]]
    best: set[tuple[int, int]] = field(default_factory=set)
    baselines: int = 0  # rows before the experts
    training: int = 0  # columns before the novel domains
    notes: list[str] = field(default_factory=list)  # of each column, shown with its cells; none if empty

    def texts(self) -> list[list[str]]:
        """The numbers as they are written."""
        text = perplexity if self.baselines or self.best else weight_text
        return [[NOTHING if number is None else text(number) for number in row] for row in self.values]


def perplexity_matrix(results: Results) -> Matrix:
    """Return the perplexity of seed LM, dense and every expert on every domain."""
    baselines, names = [m for m in (SEED, DENSE) if m in results.methods], experts(results)
    models, training = [*baselines, *(f"{EXPERT}{name}" for name in names)], training_domains(results)
    domains = [*training, *novel_domains(results)]
    values = [[value(results, model, domain) for domain in domains] for model in models]
    bests = [lowest({str(i): v for i, v in enumerate(column)}) for column in zip(*values, strict=True)]
    own = {(len(baselines) + i, domains.index(name)) for i, name in enumerate(names) if name in domains}
    best = {(int(i), j) for j, rows in enumerate(bests) for i in rows}
    return Matrix([label(m) for m in models], domains, values, own, best, len(baselines), len(training))


def weight_matrix(results: Results) -> Matrix:
    """Return the weight of every expert in the cached prior of every domain."""
    priors, training = results.priors, training_domains(results)
    domains = [domain for domain in results.domains if domain in priors]
    names = list(dict.fromkeys(name for domain in domains for name in priors[domain]))
    values = [[priors[domain].get(name) for domain in domains] for name in names]
    own = {(names.index(domain), j) for j, domain in enumerate(domains) if domain in names}
    return Matrix(names, domains, values, own, training=sum(domain in training for domain in domains))


def routing_matrix(results: Results) -> Matrix:
    """Return each expert's fraction of the uses in each layer of the mixture, layer by layer for each domain."""
    routing = results.routing
    names = list(dict.fromkeys(name for experts in routing.values() for name in experts))
    layers = {domain: max(map(len, experts.values()), default=0) for domain, experts in routing.items()}
    places = [(domain, layer) for domain, count in layers.items() for layer in range(count)]
    by_place = {
        (name, domain, layer): value
        for domain, experts in routing.items()
        for name, by_layer in experts.items()
        for layer, value in enumerate(by_layer)
    }
    values = [[by_place.get((name, domain, layer)) for domain, layer in places] for name in names]
    own = {(names.index(domain), j) for j, (domain, _) in enumerate(places) if domain in names}
    columns = [f"{domain} {layer + 1}" for domain, layer in places]
    entropies = routing_entropies(results)
    notes = [] if entropies is None else [f"router entropy {entropy:.2f} nats" for entropy in entropies]
    return Matrix(names, columns, values, own, training=len(columns), notes=notes)


def routing_entropies(results: Results) -> list[float] | None:
    """Return the mean entropy of the router in nats for each column of the routing matrix; None if one is unknown."""
    found: list[float] = []
    for domain, by_expert in results.routing.items():
        own = results.routing_entropy.get(domain, ())
        if len(own) != max(map(len, by_expert.values()), default=0):
            return None
        found += own
    return found


def nearness(values: Values) -> list[list[float | None]]:
    """Shades [rows, columns]: 1 at a column's lowest, 0 at `FARTHEST` times that, by logarithm."""
    bests = [min((v for v in column if v is not None and v > 0), default=None) for column in zip(*values, strict=True)]

    def near(number: float | None, best: float | None) -> float | None:
        if number is None or best is None or not (math.isfinite(number) and number > 0):
            return None
        return max(0.0, 1.0 - math.log(number / best) / math.log(FARTHEST))

    return [[near(number, best) for number, best in zip(row, bests, strict=True)] for row in values]


def expert_matrix(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw every expert's perplexity on every domain; colour compares within a column."""
    matrix = perplexity_matrix(results)
    return _heat_map(matrix, nearness(matrix.values), [f"{FARTHEST:g}\u00d7", "best"], width)


def prior_matrix(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw the weight of every expert in the cached prior of every domain."""
    matrix = weight_matrix(results)
    return _heat_map(matrix, matrix.values, ["0", "1"], width)


def routing_map(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw each expert's fraction of the uses by domain and layer."""
    matrix = routing_matrix(results)
    return _heat_map(matrix, matrix.values, ["0", "1"], width)


def smallest_width(matrix: Matrix) -> int:
    """The pixels below which a matrix scrolls, so that its numbers stay legible."""
    return 110 + len(matrix.columns) * (44 if len(matrix.columns) <= _MOST_NUMBERED else 12)


def _heat_map(matrix: Matrix, shades: Values, ends: list[str], width: int) -> go.Figure:
    numbered, narrow = len(matrix.columns) <= _MOST_NUMBERED, is_narrow(width)
    rows, columns = ([literal(name) for name in names] for names in (matrix.rows, matrix.columns))
    short = [literal(name, 18) for name in matrix.columns]
    texts = [
        [f"<b>{text}</b>" if (i, j) in matrix.best else text for j, text in enumerate(row)]
        for i, row in enumerate(matrix.texts())
    ]
    key: dict[str, Any] = {"orientation": "h", "thickness": 10, "len": 160, "lenmode": "pixels", "ypad": 4}
    key |= {
        "outlinewidth": 0.5,
        "outlinecolor": INK,
        "x": 0,
        "xanchor": "left",
        "y": 0,
        "yref": "container",
        "yanchor": "bottom",
    }
    z = [[None if shade is None else round(shade, 4) for shade in row] for row in shades]
    heat = go.Heatmap(x=columns, y=rows, z=z, text=texts, zmin=0, zmax=1, colorscale=[[0, PAPER], [1, COLOURS["heat"]]])
    note = "<br>%{customdata}" if matrix.notes else ""
    heat.update(hovertemplate=f"<b>%{{y}}</b> on %{{x}}<br>%{{text}}{note}<extra></extra>")
    heat.update(customdata=[matrix.notes] * len(rows) if matrix.notes else None, xgap=1 + numbered, ygap=1 + numbered)
    heat.update(texttemplate="%{text}" if numbered else None, textfont={"size": 11 if narrow else 12})
    heat.update(colorbar=key | {"tickvals": [0, 1], "ticktext": ends})
    gap = 6 if numbered else 3
    shapes = [rule(y=matrix.baselines - 0.5, colour=PAPER, width=gap)] if matrix.baselines else []
    shapes += [rule(x=matrix.training - 0.5, colour=PAPER, width=gap)] if matrix.training < len(columns) else []
    frame = {"type": "rect", "line": {"width": 1.5, "color": INK}}
    for i, j in sorted(matrix.own):
        shapes.append(frame | {"x0": j - 0.48, "x1": j + 0.48, "y0": i - 0.46, "y1": i + 0.46})
    cell, longest = (max(width, smallest_width(matrix)) - 120) / max(1, len(columns)), max(map(len, short), default=0)
    angle = 0 if longest * 7 < cell else -45 if numbered else -90
    axis: dict[str, Any] = {"type": "category", "showgrid": False, "ticks": "", "showline": False}
    axis |= {"tickfont": {"color": INK, "size": 12 if numbered else 10}}
    across = axis | {"side": "top", "tickvals": columns, "ticktext": short, "tickangle": angle}
    # A few columns do not become bars.
    across["domain"] = [0, 1 if narrow else min(1.0, len(columns) * 110 / (width - 120))]
    down = axis | {"autorange": "reversed", "tickvals": rows}
    down["ticktext"] = [literal(name, 14 if narrow else 22) for name in matrix.rows]
    height = (28 if numbered else 15) * len(rows) + 80 + (7 * longest if angle else 0)
    return figure([heat], width, height, xaxis=across, yaxis=down, shapes=shapes, margin={"t": 8, "b": 52})
