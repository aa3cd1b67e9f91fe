"""Figures of configs/claims/domains.yaml: the same text as 2 to 32 clusters, and as its eight given domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from btm_scale.evaluate.results import Results
from btm_scale.report.equivalence import dense_equivalent
from btm_scale.run_dir import DENSE, LONGER_DENSE
from claims.claim import Bound, Evidence, Figure, NotMeasuredError
from claims.curves import Curve, Points, ratio, same
from claims.plot import plot

FAMILY = "domains"
CLUSTERS = ("2", "4", "8", "16", "32")
_HIGHEST = 1.5  # of the plot
_GIVEN, _LONGER = "given", "dense"  # points


def growing_gain(evidence: Evidence) -> list[Figure]:
    """The ensemble over dense at each number of clusters, and each over the one before."""
    curves = relative(evidence, "ensemble")
    shown = [
        Figure(
            f"`ensemble` / `dense`, {at} clusters", {seed: curve[at] for seed, curve in curves.items() if at in curve}
        )
        for at in CLUSTERS
    ]
    steps = [
        same(f"ratio to dense with {more} clusters over that with {fewer}", curves, more, fewer, Bound("<", 1))
        for fewer, more in pairwise(CLUSTERS)
    ]
    return [*steps, *shown]


def growing_equivalent(evidence: Evidence) -> list[Figure]:
    """The dense-equivalent compute with each number of clusters, and of 32 over that of 8."""
    found = {at: _equivalents(evidence, at) for at in CLUSTERS}
    figures = [
        Figure(
            f"dense-equivalent compute of `ensemble`, {at} clusters",
            {seed: times for seed, (times, _) in by_seed.items()},
            None,
            {seed: sign for seed, (_, sign) in by_seed.items() if sign != "="},
        )
        for at, by_seed in found.items()
    ]
    few, most = found["8"], found["32"]
    grown, beyond = {}, {}
    for seed in few.keys() & most.keys():
        (less, its_sign), (more, sign) = few[seed], most[seed]
        # A quotient of two limits is a limit if the divisor is bounded on the other side.
        signs = {sign, {"<": ">", ">": "<", "=": "="}[its_sign]} - {"="}
        if len(signs) < 2:
            grown[seed] = more / less
            beyond |= {seed: signs.pop()} if signs else {}
    return [Figure("equivalent with 32 clusters over that with 8", grown, Bound(">", 1), beyond), *figures]


def clusters_and_given(evidence: Evidence) -> list[Figure]:
    """Eight clusters over the eight given domains: their gains over dense of the same text, and their perplexity."""
    points = Points(evidence, FAMILY)
    gains = relative(evidence, "ensemble", ("8", _GIVEN))
    return [
        same("`ensemble` / `dense` of 8 clusters over that of the 8 given domains", gains, "8", _GIVEN, Bound("<", 1)),
        *(
            same(f"`{method}` of 8 clusters / of the 8 given domains", points.curves(method), "8", _GIVEN, bound)
            for method, bound in (("ensemble", Bound("<", 1)), ("ensemble:tempered", None), (DENSE, None))
        ),
    ]


def few_of_many(evidence: Evidence) -> list[Figure]:
    """The experts with the largest prior over all experts, of 32 and of 16 clusters."""
    points = Points(evidence, FAMILY)
    ensemble = points.curves("ensemble")

    def of(method: str, at: str, bound: Bound | None) -> Figure:
        return ratio(f"`{method}` / `ensemble`, {at} clusters", points.curves(method), at, ensemble, at, bound)

    return [
        of("ensemble:top4", "32", Bound("<", 1.01)),
        of("ensemble:top8", "32", None),
        of("ensemble:top2", "32", None),
        of("ensemble:top4", "16", None),
    ]


def drawn(evidence: Evidence) -> str:
    """Return the plot of ensembles' mean perplexity over that of dense, by the number of clusters."""
    series = {method: relative(evidence, method) for method in ("ensemble", "ensemble:tempered")}
    return plot("Perplexity by number of domains", "number of clusters", CLUSTERS, series, _HIGHEST)


def relative(evidence: Evidence, method: str, at: Sequence[str] = CLUSTERS) -> dict[int, Curve]:
    """Return the mean perplexity of a method over that of dense, by random seed and those of the points that exist."""
    points = Points(evidence, FAMILY)
    dense = points.curves(DENSE)
    return {
        seed: {one: curve[one] / dense[seed][one] for one in at if one in curve and one in dense.get(seed, {})}
        for seed, curve in points.curves(method).items()
    }


def _equivalents(evidence: Evidence, at: str) -> dict[int, tuple[float, str]]:
    """Return the dense-equivalent compute of the ensemble and its sign, by random seed.

    The longer dense baselines are those of one random seed, as ratios to the dense baseline that they share a seed LM
    with.
    """
    points = Points(evidence, FAMILY)
    longer = next(iter(points.at(_LONGER).values()), None)
    if longer is None:
        raise NotMeasuredError("There are no dense baselines with more compute.")
    found = {}
    for seed, unit in points.at(at).items():
        dense = _mean(unit, DENSE)
        values = {name: dense * _mean(longer, name) / _mean(longer, DENSE) for name in _dense_models(longer)}
        values["ensemble"] = _mean(unit, "ensemble")
        equivalent = dense_equivalent(_results(seed, values, longer["compute"]), "ensemble")
        if equivalent is not None:
            found[seed] = equivalent
    return found


def _dense_models(unit: Mapping[str, Any]) -> list[str]:
    return [name for name in unit["compute"] if name == DENSE or name.startswith(LONGER_DENSE)]


def _results(seed: int, values: Mapping[str, float], compute: Mapping[str, Any]) -> Results:
    """Return results with one domain, the mean of all."""
    methods = {name: {"perplexity": {"mean": value}, "bits_per_byte": {}} for name, value in values.items()}
    domains = {"mean": {"novel": False, "tokens": 1, "bytes": 1}}
    values_of = {"name": FAMILY, "random_seed": seed, "domains": domains, "methods": methods, "compute": compute}
    return Results.model_validate(values_of)


def _mean(unit: Mapping[str, Any], method: str) -> float:
    return float(np.mean(list(unit["perplexity"][method].values())))
