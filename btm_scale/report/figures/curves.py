"""Training losses over the one schedule that seed LM and branches share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.report.figures.style import BELOW, INK, SOFT, WIDE, expert_lines, figure, is_narrow, literal, rule
from btm_scale.report.summary import experts
from btm_scale.run_dir import DENSE, MOE, SEED
from btm_scale.train.jobs import model_names, training_job

Curves = Mapping[str, Sequence[Mapping[str, float]]]
_DEV_LOSS = "dev_loss"
MOST_BESIDE = 16  # curves whose names fit beside the plot, and whose raw losses do not hide each other


@dataclass(frozen=True)
class Curve:
    """One model's finite losses: share of the schedule, step and loss in nats, all [points]."""

    name: str
    share: np.ndarray
    step: np.ndarray
    loss: np.ndarray
    dev: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # of dev text: share, step and loss, all [points]

    @property
    def smooth(self) -> np.ndarray:
        """The moving mean of the losses [points]."""
        return smoothed(self.loss)


def schedule_curves(config: RunConfig, curves: Curves) -> list[Curve]:
    """Place each model's losses on the schedule, where branches begin at `seed_end`.

    The model's last step ends a part, or the last that it would have taken if training ended early.
    """
    end, placed = seed_end(config), []
    for model, steps in curves.items():
        finite = [row for row in steps if math.isfinite(row.get("loss", math.nan))]
        if not finite:
            continue
        last = max(row["step"] for row in steps)
        if config.dev_loss.patience is not None and model in model_names(config):
            last = max(last, training_job(config, model).steps)

        # The mixture of experts is trained after the schedule. Where the seed LM completes it, an expert with its own
        # tokens has a separate schedule.
        branch = (end if end < 1 else 0.0, 1.0)
        begin, until = {SEED: (0.0, end), MOE: (1.0, _end(config))}.get(model, branch)

        def place(step: np.ndarray, begin: float = begin, until: float = until, last: float = last) -> np.ndarray:
            return begin + (until - begin) * step / last

        step, loss = _points(finite, "loss")
        measured = [row for row in steps if math.isfinite(row.get(_DEV_LOSS, math.nan))]
        dev = None
        if measured:
            dev_step, dev_loss = _points(measured, _DEV_LOSS)
            dev = (place(dev_step), dev_step, dev_loss)
        placed.append(Curve(model, place(step), step, loss, dev))
    return placed


def _points(rows: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of a key, both [points]."""
    steps = np.array([row["step"] for row in rows], dtype=np.int32)
    return steps, np.array([row[key] for row in rows], dtype=np.float64)


def seed_end(config: RunConfig) -> float:
    """Where in the schedule, from 0 to 1, the seed LM ends and the branches begin."""
    return config.budget.seed_steps / (config.budget.seed_steps + config.budget.branch_steps)


def _end(config: RunConfig) -> float:
    """Where the joint training of the mixture of experts ends, if the schedule ends at 1."""
    return 1.0 if config.moe is None else 1.0 + config.moe.train.budget_share


def smoothed(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred moving mean [points] over a share of the points; at the ends the window is cut."""
    half = max(0, round(len(values) * share / 2))
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (total[last + 1] - total[first]) / (last - first + 1)


def training_loss(config: RunConfig, results: Results, curves: Curves, *, width: int = WIDE) -> go.Figure:
    """Draw each model's loss, a moving mean over 6% of the steps with the raw losses behind.

    `curves`: each model's rows of metrics.jsonl. Losses on dev text are markers. The vertical range leaves out the
    steep first tenth of the schedule.
    """
    # In the order in which the lines end, so that names beside the plot follow the lines.
    placed = sorted(schedule_curves(config, curves), key=lambda curve: -curve.smooth[-1])
    lines = expert_lines(experts(results))
    lines |= {SEED: {"color": SOFT, "width": 2.4}, DENSE: {"color": INK, "width": 2.4}}
    few, end = len(placed) <= MOST_BESIDE, seed_end(config)
    beside = few and not is_narrow(width)
    smooth, raw = [], []
    for rank, curve in enumerate(placed):
        kept = np.unique(np.linspace(0, len(curve.share) - 1, 240 if few else 120).astype(int))
        line = {"width": 1.9 if few else 1.3} | lines.get(curve.name, {"color": SOFT, "dash": "dot"})
        common = {"x": curve.share[kept].astype(np.float32), "mode": "lines", "legendgroup": f"{rank}"}
        common |= {"name": literal(curve.name, 24 if few else 16), "hovertext": literal(curve.name)}
        hover = "<b>%{fullData.hovertext}</b><br>loss %{y:.3f}, step %{customdata:,}<extra></extra>"
        y, y_raw = (values[kept].astype(np.float32) for values in (curve.smooth, curve.loss))
        smooth.append(go.Scatter(common, y=y, customdata=curve.step[kept], line=line, hovertemplate=hover))
        if curve.dev is not None:
            x, at, y_dev = (values.astype(np.float32) for values in curve.dev)
            marker = {"color": line["color"], "size": 5, "symbol": "diamond-open"}
            dots: dict[str, Any] = {"mode": "markers", "marker": marker, "customdata": at, "showlegend": False}
            dots |= {"hovertemplate": hover.replace("loss", "dev loss", 1)}
            smooth.append(go.Scatter(common | {"x": x, "y": y_dev} | dots))
        thin = line | {"width": 1, "dash": "solid"}
        raw.append(go.Scatter(common, y=y_raw, line=thin, opacity=0.16, hoverinfo="skip", showlegend=False))
    above = {"y": 1, "yref": "paper", "yanchor": "bottom", "font": {"color": SOFT}}
    notes = [above | {"x": 0, "xref": "paper", "xanchor": "left", "text": "loss (nats per token)"}]
    if has_branches_after_seed := 0 < end < 1:
        notes.append(above | {"x": end, "xanchor": "left", "xshift": 6, "text": "branch"})
        notes.append(above | {"x": end, "xanchor": "right", "xshift": -6, "text": "seed"})
    size = 11 if is_narrow(width) else 12
    entry = 0.61 * size * max((len(trace.name) for trace in smooth), default=0)
    below = 0 if beside else 20 * math.ceil(len(placed) / max(1, (width - 50) // (entry + 45))) + 24
    title = {"text": "share of the schedule", "font": {"color": SOFT, "size": 12}, "standoff": 8}
    layout: dict[str, Any] = {"annotations": notes[: 2 if is_narrow(width) else 3], "showlegend": True}
    layout["xaxis"] = {"range": [0, _end(config)], "tickformat": ".0%", "title": title, "showgrid": False}
    layout["yaxis"] = {"range": _range(placed), "nticks": 8}
    if has_branches_after_seed:
        layout["shapes"] = [rule(x=end, line={"color": SOFT, "width": 1, "dash": "3px,3px"})]
    # Where the legend needs more rows than planned, it scrolls.
    rows = BELOW | {"entrywidth": entry, "maxheight": max(below, 1), "tracegroupgap": 0, "font": {"size": size}}
    layout["legend"] = {"tracegroupgap": 4} if beside else rows
    layout["margin"] = {"t": 26, "r": 18, "b": 8 if beside else below + 46}
    return figure([*(raw if few else ()), *smooth], width, (300 if is_narrow(width) else 400) + below, **layout)


def _range(curves: Sequence[Curve]) -> list[float]:
    settled = np.concatenate([*(curve.smooth[curve.share >= 0.1] for curve in curves), np.empty(0)])
    if not len(settled):
        return [0.0, 1.0]
    margin = max(0.05, 0.06 * float(settled.max() - settled.min()))
    return [max(0.0, float(settled.min()) - margin), float(settled.max()) + margin]
