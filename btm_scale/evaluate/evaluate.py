"""Evaluate every method on every domain, from scores alone."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import UnsupportedModelError
from btm_scale.evaluate.by_position import as_result, perplexities, range_ends, ranges_of
from btm_scale.evaluate.ensemble import Fitted, FittedWeights, ensemble_methods, fitted_to, routed_methods
from btm_scale.evaluate.mixture_facts import (
    mixture_note,
    parameters_of,
    routing_by_domain,
    routing_entropy_by_domain,
)
from btm_scale.evaluate.readiness import dense_models, require_evaluable
from btm_scale.evaluate.results import MAX_LOSS, Compute, EvaluatedDomain, MethodResult, RanOn, Results
from btm_scale.forest.average_models import average_model, averages_of
from btm_scale.forest.expert import Expert, find_expert, read_expert
from btm_scale.forest.forest import ancestors, experts, lineage
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.scores import Scores, Stack, dev_prior, evaluation_text, scored_on
from btm_scale.model.hf_config import read_shape
from btm_scale.run_dir import MOE, SEED, RunDir, finished_models
from btm_scale.util.files import make_directory
from btm_scale.util.pools import in_processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Measure:
    """Converts a text's total log-probability to perplexity and bits per byte."""

    tokens: int
    bytes: int

    def of(self, nats: float) -> tuple[float, float] | None:
        """Return perplexity and bits per byte, or None for a loss whose perplexity no float can hold."""
        if -nats / self.tokens > MAX_LOSS:
            return None
        return math.exp(-nats / self.tokens), -nats / math.log(2.0) / self.bytes


@dataclass(frozen=True)
class _DomainResult:
    """The results of one domain."""

    measure: _Measure
    fitted: FittedWeights
    nats: dict[str, float]  # by method: the text's log-probability
    by_position: dict[str, tuple[float | None, ...]]  # by method: perplexities


def evaluate(config: RunConfig, run: RunDir) -> Results:
    """Evaluate every method on every domain from scores, and write results.json.

    Raises ForestError as `require_evaluable` does.
    """
    require_evaluable(config, run)
    names = list(experts(run))
    averages = averages_of(config, run)
    notes = []
    if not config.evaluate.averages:
        notes.append("No averages: evaluate.averages is empty.")
    elif not averages:
        notes.append("No averages: only models of one shape can be averaged, and the experts differ.")
    if config.health.deterministic:
        notes.append("health.deterministic is set: the same layout on the same kind of GPU gives the same bits.")
    mixture = find_expert(run.model(MOE))
    if mixture is not None:
        notes.append(mixture_note(run, mixture))
    domains = list(config.all_domains)
    texts = [evaluation_text(config, run, domain, config.evaluate.split) for domain in domains]
    evaluated = in_processes(
        functools.partial(_evaluate_domain, config, run, names, averages, mixture is not None), texts
    )
    by_domain = dict(zip(domains, evaluated, strict=True))
    results = Results(
        name=config.name,
        random_seed=config.random_seed,
        domains={
            domain: EvaluatedDomain(
                novel=domain in config.novel_domains, tokens=entry.measure.tokens, bytes=entry.measure.bytes
            )
            for domain, entry in by_domain.items()
        },
        methods=_results_by_method(by_domain, notes),
        positions=as_result(
            range_ends(config.budget.sequence_length), {name: entry.by_position for name, entry in by_domain.items()}
        ),
        compute=_compute_by_method(config, run, names, averages, mixture),
        parameters={} if mixture is None else {MOE: parameters_of(run, MOE)},
        routing={} if mixture is None else routing_by_domain(config, run, mixture),
        routing_entropy={} if mixture is None else routing_entropy_by_domain(config, run),
        priors={domain: _prior(names, entry.fitted.cached) for domain, entry in by_domain.items()},
        tempering={domain: entry.fitted.cached.tempering for domain, entry in by_domain.items()},
        static_priors={domain: _prior(names, entry.fitted.static) for domain, entry in by_domain.items()},
        static_tempering={domain: entry.fitted.static.tempering for domain, entry in by_domain.items()},
        gates={domain: entry.fitted.gate for domain, entry in by_domain.items()},
        lineage=lineage(run),
        devices=_devices(config, run, [*names, *([MOE] if mixture is not None else [])]),
        notes=tuple(notes),
    )
    make_directory(run.results.parent)
    results.save(run.results)
    return results


def _devices(config: RunConfig, run: RunDir, names: Sequence[str]) -> dict[str, RanOn]:
    """Return the devices that trained each model and scored the texts that are evaluated."""
    models = [SEED, *dense_models(config), *names, *config.random_split_models]
    split = config.evaluate.split
    devices = {}
    for model in models:
        # A domain that was added later may have been scored elsewhere.
        texts = {scored_on(run.scores(model, domain, split)) for domain in config.all_domains}
        scored, kernels = (", ".join(sorted(filter(None, values))) for values in map(set, zip(*texts, strict=True)))
        devices[model] = RanOn(trained=read_expert(run.model(model)).device, scored=scored, kernels=kernels)
    return devices


def _prior(names: Sequence[str], fitted: Fitted) -> dict[str, float]:
    return dict(zip(names, np.exp(fitted.log_prior).tolist(), strict=True))


def _results_by_method(by_domain: Mapping[str, _DomainResult], notes: list[str]) -> dict[str, MethodResult]:
    """Return the results of every method; what has diverged is left out and added to the notes."""
    results: dict[str, MethodResult] = {}
    for domain, evaluated in by_domain.items():
        for method, nats in evaluated.nats.items():
            entry = results.setdefault(method, MethodResult(perplexity={}, bits_per_byte={}))
            if (result := evaluated.measure.of(nats)) is None:
                loss = -nats / evaluated.measure.tokens
                notes.append(
                    f"'{method}' diverged: its loss on {domain} is {loss:,.0f} nats per token. It is left out."
                )
                logger.warning(notes[-1])
                continue
            entry.perplexity[domain], entry.bits_per_byte[domain] = result
    return results


def _evaluate_domain(
    config: RunConfig, run: RunDir, names: list[str], averages: Sequence[str], has_mixture: bool, text: EvaluationText
) -> _DomainResult:
    domain = text.domain
    fitted = fitted_to(Stack.load(run, names, domain, "dev"), config.evaluate)
    prior = fitted.cached.log_prior
    methods = {
        method: Scores.load(run.scores(model, domain, config.evaluate.split)).log_probs
        for method, model in _single_models(config, names, averages, domain, prior).items()
    }
    if has_mixture:
        methods[MOE] = Scores.load(run.scores(MOE, domain, config.evaluate.split)).log_probs
    methods |= _mixtures(config, run, text, names, fitted)
    counted = {method: text.of_targets(log_probs) for method, log_probs in methods.items()}
    nats = {method: float(np.sum(log_probs, dtype=np.float64)) for method, log_probs in counted.items()}
    ends = range_ends(config.budget.sequence_length)
    ranges = text.of_targets(ranges_of(text.block_starts, len(text.targets), ends))
    by_position = {method: perplexities(log_probs, ranges, len(ends)) for method, log_probs in counted.items()}
    return _DomainResult(_Measure(len(counted[SEED]), text.bytes), fitted, nats, by_position)


def _single_models(
    config: RunConfig, names: Sequence[str], averages: Sequence[str], domain: str, prior: np.ndarray
) -> dict[str, str]:
    """Return the model behind each method that is a single model."""
    models = {SEED: SEED} | {model: model for model in dense_models(config)}
    models |= {f"expert:{name}": name for name in names}
    return models | {f"average:{kind}": average_model(kind, domain, names, prior) for kind in averages}


def _mixtures(
    config: RunConfig, run: RunDir, text: EvaluationText, names: list[str], fitted: FittedWeights
) -> dict[str, np.ndarray]:
    """Return the log-probabilities [tokens] of every method that mixes models."""
    domain, split = text.domain, text.split
    forest = Stack.load(run, names, domain, split)
    methods = ensemble_methods(forest, fitted, config.evaluate)
    methods |= routed_methods(config, run, names, forest, text)
    if config.random_split_models:
        control = Stack.load(run, config.random_split_models, domain, split)
        control_prior = dev_prior(run, config.random_split_models, domain)
        methods["random-split"] = mixture_log_probs(control.log_probs, control.block_starts, log_prior=control_prior)
    return methods


def _compute_by_method(
    config: RunConfig, run: RunDir, names: list[str], averages: Sequence[str], mixture: Expert | None
) -> dict[str, Compute]:
    """Return the training tokens and FLOPs behind each method: of its models and all ancestors, each counted once."""
    behind: dict[str, list[str]] = {SEED: []} | {f"expert:{name}": [name] for name in names}
    behind |= dict.fromkeys(("ensemble", *(f"average:{kind}" for kind in averages)), names)
    behind |= {model: [model] for model in dense_models(config)}
    if mixture is not None:
        shared = mixture.layout.get("shared_expert")
        behind[MOE] = [MOE, *(model for model in finished_models(run) if model == shared)]
    if config.random_split_models:
        behind["random-split"] = config.random_split_models
    ancestors_of = {method: _all_ancestors(run, (SEED, *models)) for method, models in behind.items()}
    tokens = {model: read_expert(run.model(model)).tokens for model in set().union(*ancestors_of.values())}
    flops = {model: count * _flops_per_token(config, run, model) for model, count in tokens.items()}
    return {
        method: Compute(tokens=sum(tokens[model] for model in models), flops=sum(flops[model] for model in models))
        for method, models in ancestors_of.items()
    }


def _flops_per_token(config: RunConfig, run: RunDir, model: str) -> float:
    try:
        part = read_expert(run.model(model)).trains
        return read_shape(run.model(model)).flops_per_token(config.budget.sequence_length, part)
    except UnsupportedModelError:  # an expert from elsewhere, whose attention this package does not know
        with SafetensorsModel(run.model(model)) as weights:
            return 6.0 * sum(spec.elements for spec in weights.specs().values())


def _all_ancestors(run: RunDir, models: Iterable[str]) -> set[str]:
    return set().union(*(ancestors(run, model) for model in models))
