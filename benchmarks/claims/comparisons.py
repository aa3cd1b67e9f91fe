"""Figures of the families of configs/claims that compare two or three ways to train."""

from __future__ import annotations

import math

from claims.claim import Bound, Evidence, Figure
from claims.curves import Curve, Points, ratio, same

_LESS = Bound("<", 1)


def tuning(evidence: Evidence) -> list[Figure]:
    """The dense baseline with the settings of the other families over that with others, on dev text."""
    dense = Points(evidence, "tuning").curves("dense")
    others = {"lr-1.5e-3": "half the learning rate", "lr-6e-3": "twice the learning rate", "beta2-0.98": "beta2 0.98"}
    smaller = "a quarter of the batch, half the learning rate"
    return [
        *(same(f"`dense` as chosen / with {label}", dense, "chosen", at, _LESS) for at, label in others.items()),
        same(f"`dense` as chosen / with {smaller}", dense, "chosen", "batch-2048"),
    ]


def sizes(evidence: Evidence) -> list[Figure]:
    """The ensemble and the averages over dense, with models of each size."""
    points = Points(evidence, "sizes")
    dense = points.curves("dense")
    methods = {"ensemble": _LESS, "average:posterior": None, "average:uniform": None}
    return [
        ratio(f"`{method}` / `dense`, {size} parameters", points.curves(method), at, dense, at, bound)
        for method, bound in methods.items()
        for at, size in (("1m", "1 million"), ("4m", "4 million"), ("30m", "30 million"))
    ]


def later_rounds(evidence: Evidence) -> list[Figure]:
    """New experts from the posterior average over those from the seed LM, each on its domain."""
    points = Points(evidence, "rounds")
    rounds = {"first two added (med, news)": ("med", "news"), "last two added (cs, wiki)": ("cs", "wiki")}
    ways = ("posterior", "seed")
    figures = [
        same(f"own experts, {label}, from posterior average / from seed", _own(points, names), *ways, _LESS)
        for label, names in rounds.items()
    ]
    added = ("med", "news", "cs", "wiki")
    ensemble = points.curves("ensemble", domains=added)
    return [*figures, same("`ensemble` on their domains, from posterior average / from seed", ensemble, *ways)]


def steps_by_difficulty(evidence: Evidence) -> list[Figure]:
    """The ensemble with longer training of harder domains over equal training, in perplexity and bits per byte."""
    points = Points(evidence, "difficulty")
    figures = []
    for measure, label in (("perplexity", "mean perplexity"), ("bits_per_byte", "mean bits per byte")):
        curves = points.curves("ensemble", measure)
        figures.append(same(f"`ensemble`, {label}: harder longer / equal", curves, "harder-longer", "equal", _LESS))
        figures.append(same(f"`ensemble`, {label}: easier longer / equal", curves, "easier-longer", "equal"))
    return figures


def sizes_by_difficulty(evidence: Evidence) -> list[Figure]:
    """The ensemble with larger models for harder domains over that of equal models, and their compute."""
    points, ways = Points(evidence, "difficulty"), ("harder-larger", "same-size")
    flops = {
        seed: {at: points.at(at)[seed]["compute"]["ensemble"]["flops"] for at in ways if seed in points.at(at)}
        for seed in points.at(ways[0])
    }
    return [
        same("`ensemble`, mean perplexity: harder larger / same size", points.curves("ensemble"), *ways, _LESS),
        same(
            "`ensemble`, mean bits per byte: harder larger / same size",
            points.curves("ensemble", "bits_per_byte"),
            *ways,
            _LESS,
        ),
        same("training compute: harder larger / same size", flops, *ways),
    ]


def local_steps(evidence: Evidence) -> list[Figure]:
    """Dense with local steps over dense with data parallelism."""
    dense = Points(evidence, "local-steps").curves("dense")
    return [
        same(f"`dense`, synchronized every {steps} steps / every step", dense, steps, "1", Bound("<", 1.05))
        for steps in ("4", "16")
    ]


def rewarming(evidence: Evidence) -> list[Figure]:
    """Experts of new domains with a new warmup and decay over those with the rest of the old schedule."""
    points = Points(evidence, "continued")
    new, old = _own(points, ("med", "python")), _forgotten(points)
    return [
        same("new domains: rewarmed / carried schedule", new, "rewarmed", "carried", _LESS),
        same("old domains: rewarmed / carried schedule", old, "rewarmed", "carried"),
    ]


def replay(evidence: Evidence) -> list[Figure]:
    """The forgetting with and without replay, as logs of ratios of mean perplexities, and what replay costs."""
    points = Points(evidence, "continued")
    new, old = _own(points, ("med", "python")), _forgotten(points)
    before = points.curves("seed", domains=("math", "legal"))
    ways = ("rewarmed", "replayed")
    seeds = [seed for seed in old if set(ways) <= set(old[seed]) & set(before.get(seed, {}))]
    without, with_it = ({seed: _loss_added(old[seed], at, before[seed]) for seed in seeds} for at in ways)
    beyond_half = {seed: with_it[seed] - without[seed] / 2 for seed in seeds}
    return [
        Figure("old domains: log of the increase in mean perplexity, without replay", without, Bound(">", 0)),
        Figure("the same with replay, minus half of that without", beyond_half, Bound("<", 0)),
        Figure("old domains: log of the increase in mean perplexity, with replay", with_it),
        same("new domains: with replay / without", new, "replayed", "rewarmed", Bound("<", 1.05)),
    ]


def late_upweighting(evidence: Evidence) -> list[Figure]:
    """Dense on the domain that is up-weighted at the end over the same number of its tokens throughout."""
    points, ways = Points(evidence, "late"), ("late", "throughout")
    math_alone = points.curves("dense", domains=("math",))
    others = points.curves("dense", domains=("legal", "med", "python"))
    return [
        same("`dense` on math: up-weighted late / throughout", math_alone, *ways, _LESS),
        same("`dense` on the other domains: up-weighted late / throughout", others, *ways),
        same("`dense` on math: up-weighted late / not at all", math_alone, "late", "equal"),
    ]


def bits_per_byte(evidence: Evidence) -> list[Figure]:
    """Perplexity and bits per byte of dense with the largest vocabulary over the smallest."""
    points = Points(evidence, "tokenizers", tokenizers_differ=True)
    perplexity, bits = points.curves("dense"), points.curves("dense", "bits_per_byte")
    return [
        same("perplexity of `dense`: 8,192 tokens / 1,024 tokens", perplexity, "8192", "1024", Bound(">", 1)),
        same("bits per byte of `dense`: 8,192 tokens / 1,024 tokens", bits, "8192", "1024", _LESS),
        same("perplexity of `dense`: 4,096 tokens / 1,024 tokens", perplexity, "4096", "1024"),
        same("bits per byte of `dense`: 4,096 tokens / 1,024 tokens", bits, "4096", "1024"),
    ]


def _own(points: Points, domains: tuple[str, ...]) -> dict[int, Curve]:
    """Return the mean perplexity of each domain's own expert, by random seed and point."""
    parts = [points.curves(f"expert:{name}", domains=(name,)) for name in domains]
    return _means(parts)


def _forgotten(points: Points) -> dict[int, Curve]:
    """Return the mean perplexity of the experts of new domains on old ones, by random seed and point."""
    return _means([points.curves(f"expert:{name}", domains=("math", "legal")) for name in ("med", "python")])


def _means(parts: list[dict[int, Curve]]) -> dict[int, Curve]:
    return {
        seed: {at: math.fsum(part[seed][at] for part in parts) / len(parts) for at in curve}
        for seed, curve in parts[0].items()
    }


def _loss_added(after: Curve, at: str, before: Curve) -> float:
    return math.log(after[at] / before[at])
