"""results.json: every method's perplexity, made from scores alone."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from btm_scale.checkpoint.formats.locate import read_json
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import ForestError
from btm_scale.evaluate.ensemble import ensemble_methods, routed_methods
from btm_scale.forest.expert import read_expert
from btm_scale.forest.forest import ancestors, experts, lineage
from btm_scale.forest.methods import average_model, averages_of
from btm_scale.forest.posterior.evidence import Tempering
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import cached_prior
from btm_scale.forest.priors import tempering_of
from btm_scale.forest.scores import Scores, Stack, dev_prior, evaluation_text
from btm_scale.model.hf_config import shape_from_config
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.util.files import write_file
from btm_scale.util.pools import in_processes

SCHEMA = 1


@dataclass(frozen=True)
class _Measure:
    """Perplexity and bits a byte from a text's total log-probability."""

    tokens: int
    bytes: int

    def of(self, nats: float) -> tuple[float, float]:
        return math.exp(-nats / self.tokens), -nats / math.log(2.0) / self.bytes


@dataclass(frozen=True)
class _Judged:
    """One domain's part of the results."""

    measure: _Measure
    prior: np.ndarray  # log [experts], nats
    tempering: Tempering
    nats: dict[str, float]  # by method: the text's log-probability


def evaluate(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Work out every method on every domain and write results.json; runs no model."""
    names = list(experts(run))
    if not names:
        raise ForestError(f"no expert in {run.experts}; train some first: btm-scale run CONFIG")
    averages = averages_of(config, run)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "name": config.name,
        "random_seed": config.random_seed,
        "domains": {},
        "methods": {},
        "compute": _compute_by_method(config, run, names, averages),
        "priors": {},
        "tempering": {},
        "lineage": lineage(run),
        "notes": [],
    }
    if not averages:
        results["notes"].append("No averages: the experts are of different shapes, and only like can be averaged.")
    domains = list(config.all_domains)
    texts = [evaluation_text(config, run, domain, config.evaluate.split) for domain in domains]
    judged = in_processes(functools.partial(_judge, config, run, names, averages), texts)
    for domain, found in zip(domains, judged, strict=True):
        results["domains"][domain] = {
            "novel": domain in config.novel_domains,
            "tokens": found.measure.tokens,
            "bytes": found.measure.bytes,
        }
        results["priors"][domain] = dict(zip(names, np.exp(found.prior).tolist(), strict=True))
        results["tempering"][domain] = asdict(found.tempering)
        for method, nats in found.nats.items():
            perplexity, bits = found.measure.of(nats)
            entry = results["methods"].setdefault(method, {"perplexity": {}, "bits_per_byte": {}})
            entry["perplexity"][domain] = perplexity
            entry["bits_per_byte"][domain] = bits
    run.results.parent.mkdir(parents=True, exist_ok=True)
    write_file(run.results, json.dumps(results, indent=2) + "\n")
    return results


def load_results(run: RunDir) -> dict[str, Any]:
    """Read results.json. Raises ForestError if it isn't there or is of another make."""
    try:
        results = json.loads(run.results.read_text())
        if not isinstance(results, dict):
            raise ValueError(f"it holds a {type(results).__name__}, not an object")
    except FileNotFoundError:
        raise ForestError(f"no results at {run.results}; make them first: btm-scale evaluate RUN") from None
    except ValueError as error:
        raise ForestError(f"{run.results} is not valid JSON ({error}); run btm-scale evaluate again") from None
    if results.get("schema") != SCHEMA:
        raise ForestError(f"{run.results} has schema {results.get('schema')}, this version reads {SCHEMA}")
    if missing := [part for part in ("domains", "methods") if not isinstance(results.get(part), dict)]:
        raise ForestError(f"{run.results} lacks {' and '.join(missing)}; run btm-scale evaluate again")
    return results


def _judge(config: RunConfig, run: RunDir, names: list[str], averages: Sequence[str], text: EvaluationText) -> _Judged:
    domain = text.domain
    dev = Stack.load(run, names, domain, "dev")
    prior = cached_prior(dev.log_probs, dev.block_starts)
    tempering = tempering_of(config.evaluate, lambda: dev, prior)
    methods = {
        method: Scores.load(run.scores(model, domain, config.evaluate.split)).log_probs
        for method, model in _single_models(config, names, averages, domain, prior).items()
    }
    methods |= _mixtures(config, run, text, names, prior, tempering)
    nats = {method: float(np.sum(log_probs, dtype=np.float64)) for method, log_probs in methods.items()}
    return _Judged(_Measure(len(text.targets), text.bytes), prior, tempering, nats)


def _single_models(
    config: RunConfig, names: Sequence[str], averages: Sequence[str], domain: str, prior: np.ndarray
) -> dict[str, str]:
    """The model behind each method that is one model."""
    models = {SEED: SEED} | {model: model for model in _dense_models(config)}
    models |= {f"expert:{name}": name for name in names}
    return models | {f"average:{kind}": average_model(kind, domain, names, prior) for kind in averages}


def _mixtures(
    config: RunConfig, run: RunDir, text: EvaluationText, names: list[str], prior: np.ndarray, tempering: Tempering
) -> dict[str, np.ndarray]:
    """Log-probabilities [tokens] of every method that mixes models."""
    domain, split = text.domain, text.split
    forest = Stack.load(run, names, domain, split)
    methods = ensemble_methods(forest, prior, tempering, config.evaluate)
    methods |= routed_methods(config, run, names, forest, text)
    if config.random_split_models:
        control = Stack.load(run, config.random_split_models, domain, split)
        control_prior = dev_prior(run, config.random_split_models, domain)
        methods["random-split"] = mixture_log_probs(control.log_probs, control.block_starts, log_prior=control_prior)
    return methods


def _compute_by_method(
    config: RunConfig, run: RunDir, names: list[str], averages: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Training tokens and floating-point operations behind each method: of all its ancestors, each counted once."""
    behind: dict[str, list[str]] = {SEED: []} | {f"expert:{name}": [name] for name in names}
    behind |= dict.fromkeys(("ensemble", *(f"average:{kind}" for kind in averages)), names)
    behind |= {model: [model] for model in _dense_models(config)}
    if config.random_split_models:
        behind["random-split"] = config.random_split_models
    ways = {method: _all_ancestors(run, (SEED, *models)) for method, models in behind.items()}
    tokens = {model: read_expert(run.model(model)).tokens for model in set().union(*ways.values())}
    flops = {model: count * _flops_per_token(config, run, model) for model, count in tokens.items()}
    return {
        method: {
            "tokens": sum(tokens[model] for model in models),
            "flops": sum(flops[model] for model in models),
        }
        for method, models in ways.items()
    }


def _flops_per_token(config: RunConfig, run: RunDir, model: str) -> float:
    path = run.model(model) / "config.json"
    return shape_from_config(read_json(path), path).flops_per_token(config.budget.sequence_length)


def _dense_models(config: RunConfig) -> list[str]:
    return [*([DENSE] if config.baselines.dense else []), *config.longer_dense_models]


def _all_ancestors(run: RunDir, models: Iterable[str]) -> set[str]:
    return set().union(*(ancestors(run, model) for model in models))
