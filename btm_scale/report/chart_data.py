"""What the page's charts draw, taken from results and metrics; no drawing here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.forest.methods import ENSEMBLE, EXPERT, KINDS, POSTERIOR_AVERAGE, kind, label
from btm_scale.report.line_chart import Curve
from btm_scale.report.plots import Bar, RatioRow
from btm_scale.report.summary import mean, novel_domains, ordered_methods, perplexity, ratio, training_domains
from btm_scale.run_dir import DENSE, SEED

Curves = Mapping[str, Sequence[Mapping[str, float]]]
# The methods that the ratio chart shows, and the mark of each.
OWN_EXPERT = "Own expert"
MARKS = {
    "Ensemble": "dot",
    OWN_EXPERT: "ring",
    "Posterior average": "diamond",
    "Random split": "cross",
    "Seed LM": "square",
}
FARTHEST = 2.0  # times the best, where a heat map has faded to paper
_METHODS = {
    "Ensemble": ENSEMBLE,
    "Posterior average": POSTERIOR_AVERAGE,
    "Random split": "random-split",
    "Seed LM": SEED,
}
_COLOURS = 8


def ratio_rows(results: Results, to: str) -> list[RatioRow]:
    """The rows of the ratio chart: the mean, the training domains, the novel mean and the novel domains."""
    rows: list[RatioRow] = []
    for domains, name in ((training_domains(results), "Mean"), (novel_domains(results), "Mean, novel")):
        groups = [(name, domains)] if len(domains) > 1 else []
        groups += [(domain, [domain]) for domain in domains]
        for row_name, members in groups:
            below = mean(results, to, members)
            if below is None:
                continue
            chosen = _METHODS | ({OWN_EXPERT: f"{EXPERT}{row_name}"} if members == [row_name] else {})
            ratios, figures = {}, {}
            for series, method in chosen.items():
                against, own = ratio(results, method, to, members), mean(results, method, members)
                if method != to and against is not None and own is not None and not against.partial:
                    ratios[series], figures[series] = against.value, perplexity(own.value)
            rows.append(RatioRow(row_name, perplexity(below.value), ratios, figures, strong=len(members) > 1))
    return rows


def nearness(matrix: Sequence[Sequence[float | None]], farthest: float = FARTHEST) -> list[list[float | None]]:
    """Shades [models, domains]: 1 at a column's lowest, 0 at `farthest` times that, by logarithm."""
    lowest_of = [
        min((v for v in column if v is not None and v > 0), default=None) for column in zip(*matrix, strict=True)
    ]

    def near(number: float | None, best: float | None) -> float | None:
        if number is None or best is None or not (math.isfinite(number) and number > 0):
            return None
        return max(0.0, 1.0 - math.log(number / best) / math.log(farthest))

    return [[near(number, best) for number, best in zip(row, lowest_of, strict=True)] for row in matrix]


def training_curves(config: RunConfig, curves: Curves, styles: Mapping[str, str]) -> tuple[list[Curve], int]:
    """Every model's losses over the share of the schedule, and how many were no finite number.

    A model's last step counts as the end of its part. `styles`: each expert's CSS class.
    """
    seed_end, drawn, dropped = seed_end_share(config), [], 0
    for model, steps in sorted(curves.items(), key=lambda item: (item[0] == SEED, item[0] == DENSE)):
        finite = [row for row in steps if math.isfinite(row.get("loss", math.nan))]
        dropped += len(steps) - len(finite)
        if not finite:
            continue
        share = np.array([row["step"] for row in finite], dtype=np.float64)
        share /= max(row["step"] for row in steps)
        x = seed_end * share if model == SEED else seed_end + (1 - seed_end) * share
        style = model if model in (SEED, DENSE) else styles.get(model, "random")
        drawn.append(Curve(model, x, np.array([row["loss"] for row in finite], dtype=np.float64), style))
    return drawn, dropped


def expert_styles(results: Results) -> dict[str, str]:
    """A CSS class for each expert: a colour, and a dash once the colours are used up."""
    names = [m.removeprefix(EXPERT) for m in ordered_methods(results) if m.startswith(EXPERT)]
    return {name: f"c{i % _COLOURS}" + (" dashed" if i // _COLOURS % 2 else "") for i, name in enumerate(names)}


def compute_bars(results: Results) -> list[Bar]:
    """A bar a method; methods of one kind with the same compute share a bar."""
    compute = results.compute
    seed = compute[SEED].flops if SEED in compute else 0.0
    groups: dict[tuple[str, int, float], list[str]] = {}
    order = list(KINDS)
    for method in sorted(compute, key=lambda m: (order.index(kind(m)), m != SEED)):
        spent = compute[method]
        own = kind(method) if kind(method) in ("expert", "average") else method
        groups.setdefault((own, spent.tokens, spent.flops), []).append(method)
    bars = []
    for (own, tokens, flops), methods in groups.items():
        name = label(methods[0]) if own != "expert" else f"Expert {label(methods[0])}"
        if len(methods) > 1:
            name = f"Each of {len(methods)} {own}s"
        figure = f"{flops_text(flops)}, {tokens_text(tokens)} tokens"
        style = "bar headline" if ENSEMBLE in methods else "bar"
        bars.append(Bar(name, flops, min(seed, flops), figure, style))
    return bars


def flops_text(flops: float) -> str:
    """Operations in the largest unit that keeps them above 1."""
    for power, unit in ((21, "ZFLOP"), (18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if flops >= 10.0**power:
            return f"{flops / 10.0**power:.3g} {unit}"
    return f"{flops:.3g} FLOP"


def tokens_text(tokens: float) -> str:
    """Tokens in thousands, millions or billions."""
    for power, unit in ((12, "\u00a0T"), (9, "\u00a0B"), (6, "\u00a0M"), (3, "\u00a0K")):
        if tokens >= 10.0**power:
            return f"{tokens / 10.0**power:.3g}{unit}"
    return f"{tokens:.0f}"


def weight_text(weight: float) -> str:
    """A weight to two decimals; what would be written as 0 but isn't shows as a dot."""
    return "·" if 0 < weight < 0.005 else f"{weight:.2f}"


def seed_end_share(config: RunConfig) -> float:
    """Where in the schedule, from 0 to 1, the seed LM ends and the branches begin."""
    return config.budget.seed_steps / (config.budget.seed_steps + config.budget.branch_steps)
