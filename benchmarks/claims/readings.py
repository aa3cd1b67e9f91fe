"""Figures of the results that other benchmarks wrote: complete runs, units of the mixture of experts, dev mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from doc_ensembles import mean_ratio as ratio_of_family

import btm_scale.configs
from btm_scale.config.moe import MoeConfig
from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Results
from btm_scale.report.equivalence import dense_equivalent
from btm_scale.run_dir import DENSE, LONGER_DENSE
from claims.claim import Bound, Evidence, Figure, NotMeasuredError

_DEMO_FORESTS = "the demo"
Run = Mapping[str, Any]  # a results.json
Reading = Callable[[Evidence], list[Figure]]
# What a result of complete runs has, for labels.
FORESTS = {"study": "8 domains, 4.2M parameters", "demo": "4 domains, 1.1M parameters"}


def ratios(
    method: str, to: str, bound: Bound | None, *, results: Sequence[str] = tuple(FORESTS), novel: bool = False
) -> Reading:
    """Read the mean perplexity of one method over that of another, on trained or on novel domains, of some results."""

    def read(evidence: Evidence) -> list[Figure]:
        return [
            Figure(
                f"`{method}` / `{to}`, {_kind(novel)} ({FORESTS[name]})",
                {run["random_seed"]: _mean(run, method, novel) / _mean(run, to, novel) for run in evidence.runs(name)},
                bound,
            )
            for name in results
        ]

    return read


def worst_ratios(method: str, to: str, bound: Bound | None) -> Reading:
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
            for novel in (False, True):
                values = {}
                for run in runs:
                    ours, theirs = (ratio_of_family(run, one, novel=novel) for one in (family, to))
                    if ours is not None and theirs is not None:
                        values[run["random_seed"]] = ours / theirs
                if values or not novel:
                    found.append(Figure(f"{family} / {to}, {_kind(novel)} of `{name}`", values, bound))
        return found

    return read


def weights_over_dense(family: str, bound: Bound, *, novel: bool) -> Reading:
    """Read the mean perplexity of one family of ensemble weights over that of dense, on trained or on novel domains."""

    def read(evidence: Evidence) -> list[Figure]:
        found = []
        for name, runs in evidence.document("ensembles")["runs"].items():
            values = {run["random_seed"]: ratio_of_family(run, family, novel=novel) for run in runs}
            measured = {seed: value for seed, value in values.items() if value is not None}
            found.append(Figure(f"{family} / `dense`, {_kind(novel)} of `{name}`", measured, bound))
        return found

    return read


def moe_ratios(*pairs: tuple[str, tuple[str, str], tuple[str, str], Bound | None]) -> Reading:
    """Read the mean perplexity of mixtures over that of others in moe.json, of each figure and kind of forest.

    A pair is a label, the mixture's unit and method, and those of the other.
    """

    def read(evidence: Evidence) -> list[Figure]:
        units, found = evidence.units("moe"), []
        for label, ours, theirs, bound in pairs:
            for kind, forests in _kinds_of_forests(units).items():
                values = {}
                for seed, forest in forests.items():
                    one, other = (_unit_mean(units, forest, *method) for method in (ours, theirs))
                    if one is not None and other is not None:
                        values[seed] = one / other
                if values or kind == _DEMO_FORESTS:
                    found.append(Figure(f"{label} ({kind})", values, bound))
        return found

    return read


def moe_at_equal_compute(*shares: float) -> Reading:
    """Read the mean perplexity of a mixture of the demo over that of dense with as much training compute.

    `shares` are what joint training adds to the tokens. Dense's log perplexity is a line in log compute between two
    baselines.
    """

    def read(evidence: Evidence) -> list[Figure]:
        units, found, more = evidence.units("moe"), [], _compute_of_a_token()
        for share in shares:
            values = {}
            for seed, forest in _kinds_of_forests(units)[_DEMO_FORESTS].items():
                ours = _unit_mean(units, forest, f"joint-{share:g}", "moe")
                theirs = _dense_at(units.get(f"{forest}/dense", {}).get("perplexity", {}), 1 + share * more)
                if ours is not None and theirs is not None:
                    values[seed] = ours / theirs
            label = (
                f"mixture, {share:.0%} more tokens / `dense`, {share * more:.0%} more tokens (equal compute, the demo)"
            )
            found.append(Figure(label, values))
        return found

    return read


def all_of(*readings: Reading) -> Reading:
    """Read the figures of several readings."""
    return lambda evidence: [figure for read in readings for figure in read(evidence)]


def rank_correlations(bound: Bound) -> Reading:
    """Read Spearman's correlation of the mean perplexity of averages with that of trained mixtures.

    That of the perplexity which is predicted of trained models is beside it, without a bound. The forest whose
    mixtures are held out has figures of its own.
    """
    from doc_mixtures import HELD_OUT, PREDICTIONS, predictors, rank_correlation

    def read(evidence: Evidence) -> list[Figure]:
        units, found = evidence.units("mixtures"), []
        for key, of in reversed(PREDICTIONS.items()):
            for unit, experts in predictors():
                for held_out in (False, True):
                    values = {
                        int(name.rpartition("-")[2]): value
                        for name in _forests(units)
                        if (name == HELD_OUT) == held_out
                        and (value := rank_correlation(units, name, unit, key)) is not None
                    }
                    if values or not held_out:
                        label = f"Spearman's correlation, {of}, {experts} in the experts"
                        label += ", other mixtures" if held_out else ""
                        found.append(Figure(label, values, bound if key == "averages" else None))
        return found

    return read


def _kind(novel: bool) -> str:
    return "novel domains" if novel else "trained domains"


def _kinds_of_forests(units: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Return the forests of moe.json by random seed, of the demo and of eight domains."""
    kinds = {_DEMO_FORESTS: "demo-", "8 domains": "eight-"}
    return {
        kind: {int(name.removeprefix(prefix)): name for name in _forests(units) if name.startswith(prefix)}
        for kind, prefix in kinds.items()
    }


def _compute_of_a_token() -> float:
    """Return the training compute of a token of the demo's mixture over that of dense."""
    config = RunConfig.load(Path(btm_scale.configs.__file__).parent / "demo.yaml")
    length = config.budget.sequence_length
    dense = config.model.shape(config.tokenizer.vocab_size, length)
    mixture = dense.mixture(len(config.domains), MoeConfig().top_k)
    return mixture.flops_per_token(length) / dense.flops_per_token(length)


def _dense_at(perplexity: Mapping[str, Mapping[str, float]], compute: float) -> float | None:
    """Return dense's mean perplexity with some multiple of its compute, or None beyond its baselines."""
    known = {
        1.0 if name == DENSE else float(name.removeprefix(LONGER_DENSE).removesuffix("x")): _mean_of(by_domain)
        for name, by_domain in perplexity.items()
        if name == DENSE or name.startswith(LONGER_DENSE)
    }
    if not known or not min(known) <= compute <= max(known):
        return None
    steps = sorted(known)
    return math.exp(np.interp(math.log(compute), np.log(steps), [math.log(known[step]) for step in steps]))


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
