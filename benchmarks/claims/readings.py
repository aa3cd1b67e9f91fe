"""Figures of the results that other benchmarks wrote: complete runs, units of the mixture of experts, dev mixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from doc_ensembles import mean_ratio as ratio_of_family

from btm_scale.evaluate.results import Results
from btm_scale.report.equivalence import dense_equivalent
from claims.claim import Bound, Evidence, Figure, NotMeasuredError

Run = Mapping[str, Any]  # a results.json
Reading = Callable[[Evidence], list[Figure]]
# What a result of complete runs has, for labels.
FORESTS = {"study": "8 domains, 4.2M parameters", "demo": "4 domains, 1.1M parameters"}


def ratios(
    method: str, to: str, bound: Bound | None, *, results: Sequence[str] = tuple(FORESTS), novel: bool = False
) -> Reading:
    """Read the mean perplexity of one method over that of another, on trained or on novel domains, of some results."""

    def read(evidence: Evidence) -> list[Figure]:
        kind = "novel domains" if novel else "trained domains"
        return [
            Figure(
                f"`{method}` / `{to}`, {kind} ({FORESTS[name]})",
                {run["random_seed"]: _mean(run, method, novel) / _mean(run, to, novel) for run in evidence.runs(name)},
                bound,
            )
            for name in results
        ]

    return read


def worst_ratios(method: str, to: str, bound: Bound) -> Reading:
    """Read the largest ratio of two methods' perplexities on any trained domain, of all results."""

    def read(evidence: Evidence) -> list[Figure]:
        return [
            Figure(
                f"`{method}` / `{to}`, worst trained domain ({label})",
                {run["random_seed"]: max(_by_domain(run, method, to)) for run in evidence.runs(name)},
                bound,
            )
            for name, label in FORESTS.items()
        ]

    return read


def compute_equivalents(methods: Mapping[str, Bound | None]) -> Reading:
    """Read how many times the compute of the dense baseline reaches each method's mean perplexity."""

    def read(evidence: Evidence) -> list[Figure]:
        found = []
        for method, bound in methods.items():
            values, beyond = {}, {}
            for run in evidence.runs("study"):
                equivalent = dense_equivalent(_as_results(run), method)
                if equivalent is not None:
                    values[run["random_seed"]], sign = equivalent
                    beyond |= {} if sign == "=" else {run["random_seed"]: sign}
            label = f"dense-equivalent compute of `{method}` / its compute"
            found.append(Figure(label, values, bound, beyond))
        return found

    return read


def families_of_weights(family: str, to: str, bound: Bound) -> Reading:
    """Read the mean perplexity of one family of ensemble weights over that of another, on trained and novel domains."""

    def read(evidence: Evidence) -> list[Figure]:
        found = []
        for name, runs in evidence.document("ensembles")["runs"].items():
            for novel, kind in ((False, "trained domains"), (True, "novel text")):
                values = {}
                for run in runs:
                    ours, theirs = (ratio_of_family(run, one, novel=novel) for one in (family, to))
                    if ours is not None and theirs is not None:
                        values[run["random_seed"]] = ours / theirs
                if values or not novel:
                    found.append(Figure(f"{family} / {to}, {kind} of `{name}`", values, bound))
        return found

    return read


def moe_ratios(*pairs: tuple[str, str, str, str, Bound | None]) -> Reading:
    """Read mean perplexities of units of moe.json: (unit, method, other unit, other method, bound) of each figure."""

    def read(evidence: Evidence) -> list[Figure]:
        units = evidence.units("moe")
        forests = sorted({name.partition("/")[0] for name in units if name.startswith("demo-")})
        found = []
        for recipe, method, other_recipe, other, bound in pairs:
            values = {}
            for forest in forests:
                ours, theirs = (_unit_mean(units, forest, *one) for one in ((recipe, method), (other_recipe, other)))
                if ours is not None and theirs is not None:
                    values[int(forest.rpartition("-")[2])] = ours / theirs
            found.append(Figure(f"`{method}` ({recipe}) / `{other}` ({other_recipe})", values, bound))
        return found

    return read


def all_of(*readings: Reading) -> Reading:
    """Read the figures of several readings."""
    return lambda evidence: [figure for read in readings for figure in read(evidence)]


def rank_correlations(bound: Bound) -> Reading:
    """Read Spearman's correlation of the mean perplexity of averages with that of trained mixtures.

    That of the perplexity which is predicted of trained models is beside it, without a bound.
    """
    from doc_mixtures import PREDICTIONS, predictors, rank_correlation

    def read(evidence: Evidence) -> list[Figure]:
        units, found = evidence.units("mixtures"), []
        for key, of in reversed(PREDICTIONS.items()):
            for unit, experts in predictors():
                by_forest = {name: rank_correlation(units, name, unit, key) for name in _forests(units)}
                values = {int(name.rpartition("-")[2]): value for name, value in by_forest.items() if value is not None}
                label = f"Spearman's correlation, {of}, {experts} in the experts"
                found.append(Figure(label, values, bound if key == "averages" else None))
        return found

    return read


def _forests(units: Mapping[str, Any]) -> list[str]:
    return sorted({name.partition("/")[0] for name in units})


def _unit_mean(units: Mapping[str, Any], forest: str, recipe: str, method: str) -> float | None:
    found = units.get(f"{forest}/{recipe}", {}).get("perplexity", {}).get(method)
    return None if found is None else _mean_of(found)


def _domains(run: Run, novel: bool) -> list[str]:
    return [name for name, domain in run["domains"].items() if domain["novel"] == novel]


def _mean(run: Run, method: str, novel: bool) -> float:
    perplexity = run["methods"][method]["perplexity"]
    return _mean_of({name: perplexity[name] for name in _domains(run, novel)})


def _by_domain(run: Run, method: str, to: str) -> Sequence[float]:
    ours, theirs = (run["methods"][one]["perplexity"] for one in (method, to))
    return [ours[name] / theirs[name] for name in _domains(run, novel=False)]


def _mean_of(by_domain: Mapping[str, float]) -> float:
    if not by_domain:
        raise NotMeasuredError("A mean needs at least one domain.")
    return float(np.mean(list(by_domain.values())))


def _as_results(run: Run) -> Results:
    return Results.model_validate({key: value for key, value in run.items() if key != "schema"})
