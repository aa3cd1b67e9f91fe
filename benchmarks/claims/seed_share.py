"""Figures of configs/claims/seed-share.yaml."""

from __future__ import annotations

from claims.claim import Bound, Evidence, Figure
from claims.curves import Curve, Points, complete, ratio
from claims.plot import plot

FAMILY = "seed-share"
SHARES = ("0", "0.25", "0.5", "0.75", "1")
_BRANCHING = SHARES[:-1]  # at a share of 1, experts are the seed LM, and so is their average
_DENSE_AT = "0.5"
_HIGHEST = 2.0  # of the plot
_MORE = Bound(">", 0)
METHODS = {"ensemble": "`ensemble`", "average:uniform": "`average:uniform`", "average:posterior": "`average:posterior`"}


def optimum(evidence: Evidence) -> list[Figure]:
    """The ensemble at each share over dense, and at a half over every other."""
    points = Points(evidence, FAMILY)
    ensemble, dense = points.curves("ensemble"), points.curves("dense")
    shown = [ratio(f"`ensemble` at {at} / `dense`", ensemble, at, dense, _DENSE_AT, None) for at in SHARES]
    decisive = [
        ratio(f"`ensemble` at 0.5 / `ensemble` at {to}", ensemble, "0.5", ensemble, to, Bound("<", 1))
        for to in ("0", "0.25", "0.75", "1")
    ]
    return [*decisive, *shown]


def average_wants_more(evidence: Evidence) -> list[Figure]:
    """The best share below 1 for each average minus that for the ensemble, and that it is better than no branching."""
    points = Points(evidence, FAMILY)
    curves = {name: points.curves(name) for name in METHODS}
    best = {name: _best(complete(curve, _BRANCHING)) for name, curve in curves.items()}
    averages = [name for name in METHODS if name != "ensemble"]
    more = {name: {seed: share - best["ensemble"][seed] for seed, share in best[name].items()} for name in averages}
    return [
        *(Figure(f"best share for {METHODS[name]} minus that for `ensemble`", more[name], _MORE) for name in averages),
        *(
            ratio(f"{METHODS[name]} at 0.75 / at 1", curves[name], "0.75", curves[name], "1", Bound("<", 1))
            for name in averages
        ),
        *(Figure(f"best share for {METHODS[name]}", shares) for name, shares in best.items()),
    ]


def no_seed_no_average(evidence: Evidence) -> list[Figure]:
    """The uniform average of experts that branch from random weights, over dense, beside those of a trained seed LM."""
    points = Points(evidence, FAMILY)
    uniform, dense = points.curves("average:uniform"), points.curves("dense")

    def at(share: str, bound: Bound | None) -> Figure:
        return ratio(f"`average:uniform` at {share} / `dense`", uniform, share, dense, _DENSE_AT, bound)

    itself = Figure(
        "perplexity of `average:uniform` at 0", {seed: one["0"] for seed, one in uniform.items() if "0" in one}
    )
    return [at("0", Bound(">", 10)), itself, at("0.25", None), at("0.5", None)]


def drawn(evidence: Evidence) -> str:
    """Return the plot of each method's mean perplexity over that of dense, by seed share."""
    points = Points(evidence, FAMILY)
    dense = {seed: curve[_DENSE_AT] for seed, curve in points.curves("dense").items()}
    series = {
        name: {
            seed: {share: value / dense[seed] for share, value in curve.items()}
            for seed, curve in points.curves(name).items()
            if seed in dense
        }
        for name in METHODS
    }
    return plot("Perplexity by seed share", "fraction of the tokens for the seed LM", SHARES, series, _HIGHEST)


def _best(curves: dict[int, Curve]) -> dict[int, float]:
    return {seed: float(min(_BRANCHING, key=curve.__getitem__)) for seed, curve in curves.items()}
