"""Experts against domains: perplexities, and the weights of the prior."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import EXPERT, label
from btm_scale.report.figures.style import HEAT, INK, PAPER, WIDE, figure, is_narrow, literal
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


@dataclass(frozen=True)
class Matrix:
    """Numbers [rows, columns], None where there is none; which cells are an expert on its own domain or a best."""

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    own: set[tuple[int, int]]
    best: set[tuple[int, int]]
    baselines: int = 0  # rows before the experts
    training: int = 0  # columns before the novel domains

    @property
    def own_that_are_best(self) -> int:
        """In how many domains the domain's own expert is the best."""
        return len(self.own & self.best)


def perplexity_matrix(results: Results) -> Matrix:
    """Return the perplexity of seed LM, dense and every expert on every domain."""
    baselines, names = [m for m in (SEED, DENSE) if m in results.methods], experts(results)
    models = [*baselines, *(f"{EXPERT}{name}" for name in names)]
    training = training_domains(results)
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
    return Matrix(names, domains, values, own, set(), 0, sum(domain in training for domain in domains))


def nearness(values: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """Shades [rows, columns]: 1 at a column's lowest, 0 at `FARTHEST` times that, by logarithm."""
    bests = [min((v for v in column if v is not None and v > 0), default=None) for column in zip(*values, strict=True)]

    def near(number: float | None, best: float | None) -> float | None:
        if number is None or best is None or not (math.isfinite(number) and number > 0):
            return None
        return round(max(0.0, 1.0 - math.log(number / best) / math.log(FARTHEST)), 4)

    return [[near(number, best) for number, best in zip(row, bests, strict=True)] for row in values]


def expert_matrix(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw every expert's perplexity on every domain; colour compares within a column."""
    matrix = perplexity_matrix(results)
    texts = [[NOTHING if number is None else perplexity(number) for number in row] for row in matrix.values]
    return _heat_map(matrix, nearness(matrix.values), texts, (f"{FARTHEST:g}\u00d7", "best"), width)


def prior_matrix(results: Results, *, width: int = WIDE) -> go.Figure:
    """Draw the weight of every expert in the cached prior of every domain."""
    matrix = weight_matrix(results)
    texts = [[NOTHING if number is None else weight_text(number) for number in row] for row in matrix.values]
    shades = [[None if number is None else round(number, 4) for number in row] for row in matrix.values]
    return _heat_map(matrix, shades, texts, ("0", "1"), width)


def smallest_width(matrix: Matrix) -> int:
    """The pixels below which a matrix scrolls, so that its numbers stay legible."""
    return 110 + len(matrix.columns) * (44 if len(matrix.columns) <= _MOST_NUMBERED else 12)


def _heat_map(
    matrix: Matrix,
    shades: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    ends: tuple[str, str],
    width: int,
) -> go.Figure:
    numbered, narrow = len(matrix.columns) <= _MOST_NUMBERED, is_narrow(width)
    rows, columns = ([literal(name) for name in names] for names in (matrix.rows, matrix.columns))
    shown = [[f"<b>{t}</b>" if (i, j) in matrix.best else t for j, t in enumerate(row)] for i, row in enumerate(texts)]
    heat = go.Heatmap(
        x=columns,
        y=rows,
        z=shades,
        text=shown,
        texttemplate="%{text}" if numbered else None,
        textfont={"size": 12 if not narrow else 11},
        hovertemplate="<b>%{y}</b> on %{x}<br>%{text}<extra></extra>",
        zmin=0,
        zmax=1,
        xgap=2 if numbered else 1,
        ygap=2 if numbered else 1,
        colorscale=[[0, PAPER], [1, HEAT]],
        colorbar={
            "orientation": "h",
            "thickness": 10,
            "len": 160,
            "lenmode": "pixels",
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "tickvals": [0, 1],
            "ticktext": list(ends),
            "outlinewidth": 0.5,
            "outlinecolor": INK,
            "ypad": 4,
        },
    )
    frames = [
        {
            "type": "rect",
            "x0": j - 0.48,
            "x1": j + 0.48,
            "y0": i - 0.46,
            "y1": i + 0.46,
            "line": {"width": 1.5, "color": INK},
        }
        for i, j in sorted(matrix.own)
    ]
    gap = {"type": "line", "line": {"width": 6 if numbered else 3, "color": PAPER}}
    if matrix.baselines:
        at = matrix.baselines - 0.5
        frames.insert(0, gap | {"xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at})
    if matrix.training < len(columns):
        at = matrix.training - 0.5
        frames.insert(0, gap | {"yref": "paper", "y0": 0, "y1": 1, "x0": at, "x1": at})
    cell = (max(width, smallest_width(matrix)) - 120) / max(1, len(columns))
    longest = max(map(len, _short(matrix.columns)), default=0)
    angle = 0 if longest * 7 < cell else -45 if numbered else -90
    axis = {"type": "category", "showgrid": False, "ticks": "", "showline": False}
    font = {"color": INK, "size": 12 if numbered else 10}
    return figure(
        [heat],
        width,
        (28 if numbered else 15) * len(rows) + 80 + (7 * longest if angle else 0),
        xaxis=axis
        | {
            "side": "top",
            "tickvals": columns,
            "ticktext": _short(matrix.columns),
            "tickfont": font,
            "tickangle": angle,
        },
        yaxis=axis
        | {
            "autorange": "reversed",
            "tickvals": rows,
            "ticktext": _short(matrix.rows, 14 if narrow else 22),
            "tickfont": font,
        },
        shapes=frames,
        margin={"t": 8, "b": 52},
    )


def _short(names: Collection[str], length: int = 18) -> list[str]:
    return [literal(name, length) for name in names]
