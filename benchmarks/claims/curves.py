"""Figures of the families of configs/claims: a mean perplexity at each point and random seed, and what follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from claims.claim import Bound, Evidence, Figure, NotMeasuredError

Unit = Mapping[str, Any]
Curve = dict[str, float]  # by point
Reading = Callable[[Evidence], list[Figure]]


class Points:
    """The units of a family, by random seed and point.

    Raises ValueError if they were evaluated on different text, except with different tokenizers, which cut it
    differently at the end.
    """

    def __init__(self, evidence: Evidence, family: str, *, tokenizers_differ: bool = False) -> None:
        self._units = evidence.units(f"claims/{family}")
        if not self._units:
            raise NotMeasuredError(f"'{family}' has no unit.")
        if not tokenizers_differ and len({json.dumps(unit["bytes"]) for unit in self._units.values()}) > 1:
            raise ValueError(f"The units of '{family}' were evaluated on different text. Measure them again.")

    def curves(self, method: str, measure: str = "perplexity", domains: tuple[str, ...] = ()) -> dict[int, Curve]:
        """Return the mean of a method on some domains, by default all, by random seed and point that have it."""
        found: dict[int, Curve] = {}
        for unit in self._units.values():
            if method in unit[measure]:
                values = unit[measure][method]
                chosen = [values[name] for name in domains or values]
                found.setdefault(unit["random_seed"], {})[unit["point"]] = float(np.mean(chosen))
        return found

    def at(self, point: str) -> dict[int, Unit]:
        """Return the units of a point, by random seed."""
        return {unit["random_seed"]: unit for unit in self._units.values() if unit["point"] == point}


def ratio(
    label: str, ours: dict[int, Curve], at: str, theirs: dict[int, Curve], to: str, bound: Bound | None
) -> Figure:
    """Return a curve at one point over another, or the same, at another point, of the seeds that have both."""
    seeds = [seed for seed in ours if at in ours[seed] and to in theirs.get(seed, {})]
    return Figure(label, {seed: ours[seed][at] / theirs[seed][to] for seed in seeds}, bound)


def same(label: str, curves: dict[int, Curve], at: str, to: str, bound: Bound | None = None) -> Figure:
    """Return a curve at one point over itself at another."""
    return ratio(label, curves, at, curves, to, bound)


def complete(curves: dict[int, Curve], points: tuple[str, ...]) -> dict[int, Curve]:
    """Return the curves that have every point."""
    return {seed: curve for seed, curve in curves.items() if set(points) <= set(curve)}
