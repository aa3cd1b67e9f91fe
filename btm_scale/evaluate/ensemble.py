"""Compute the ensembles of `forest/methods.py`, which differ in posterior, prior and number of experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.config.evaluation import EvaluateConfig, Tempering
from btm_scale.config.run import RunConfig
from btm_scale.data.clustering import TENSORS, Clustering
from btm_scale.data.discover import cluster_name
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.forest.methods import ENSEMBLE, GATED, METHODS, ROUTED, ROUTED_TOP_K, TOP_K, TOP_K_PER_TOKEN, Ensemble
from btm_scale.forest.posterior.evidence import Mode
from btm_scale.forest.posterior.gate import Gate, fitted_gate, gated_mixture_log_probs
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import updating_mixture_log_probs
from btm_scale.forest.posterior.routing import routed_mixture_log_probs
from btm_scale.forest.priors import tempering_of
from btm_scale.forest.scores import DevPrior, Stack, prior_of
from btm_scale.run_dir import RunDir


@dataclass(frozen=True)
class Fitted:
    """What is estimated from a domain's dev text: a prior, and the tempering of the posterior that starts from it."""

    log_prior: np.ndarray  # nats [experts]
    tempering: Tempering


@dataclass(frozen=True)
class FittedWeights:
    """All that is estimated from a domain's dev text."""

    cached: Fitted
    static: Fitted
    gate: Gate  # from the static prior


def fitted_to(dev: Stack, settings: EvaluateConfig) -> FittedWeights:
    """Return the priors, the gate and the temperings of dev text; these are the config's if that has one."""

    def fitted(prior: DevPrior) -> Fitted:
        log_prior = prior_of(dev, prior)
        return Fitted(log_prior, tempering_of(settings, lambda: dev, log_prior))

    static = fitted("static")
    gate = fitted_gate(dev.log_probs, dev.block_starts, static.log_prior, dev.counted)
    return FittedWeights(fitted("cached"), static, gate)


def ensemble_methods(forest: Stack, fitted: FittedWeights, settings: EvaluateConfig) -> dict[str, np.ndarray]:
    """Return every ensemble's log-probabilities [tokens] in nats, from the experts' [experts, tokens].

    `ensemble` has the config's posterior and prior; the others have those of the table. A prior that is not estimated
    from dev text has the tempering of the cached one.
    """

    cached, static = fitted.cached, fitted.static
    starts = forest.block_starts if settings.blocks == "restart" else np.zeros(1, np.int64)

    def mixture(
        prior: str = "cached",
        mode: Mode = "prefix",
        top_k: int | None = None,
        top_k_per_token: int | None = None,
    ) -> np.ndarray:
        start = static if prior == "static" else cached
        return mixture_log_probs(
            forest.log_probs,
            starts,
            log_prior=None if prior == "uniform" else start.log_prior,
            mode=mode,
            top_k=top_k,
            top_k_per_token=top_k_per_token,
            tempering=start.tempering if mode == "tempered" else None,
        )

    if settings.prior == "updating":
        main = updating_mixture_log_probs(
            forest.log_probs,
            forest.block_starts,
            log_prior=cached.log_prior,
            mode=settings.posterior,
            tempering=cached.tempering if settings.posterior == "tempered" else None,
        )
    else:
        main = mixture(settings.prior, mode=settings.posterior)
    methods = {ENSEMBLE: main}
    for row in METHODS:
        if isinstance(row, Ensemble) and row.mode is not None and row.in_results:
            methods[row.name] = mixture(row.prior, mode=row.mode)
    methods[GATED.name] = gated_mixture_log_probs(forest.log_probs, starts, fitted.gate, log_prior=static.log_prior)
    for k in settings.top_k:
        if k <= len(forest.log_probs):
            methods[TOP_K.of(k)] = mixture(top_k=k)
    for k in settings.top_k_per_token:
        if k <= len(forest.log_probs):
            methods[TOP_K_PER_TOKEN.of(k)] = mixture(top_k_per_token=k)
    return methods


def routed_methods(
    config: RunConfig, run: RunDir, names: Sequence[str], forest: Stack, text: EvaluationText
) -> dict[str, np.ndarray]:
    """Return log-probabilities [targets] of `ensemble:routed` and, for the config's k, of `ensemble:routed:top<k>`.

    Empty unless the experts `names` are those of a clustering in the run's text folder, and scikit-learn, which is
    optional, is installed.
    """
    if not (config.text_root / TENSORS).is_file() or importlib.util.find_spec("sklearn") is None:
        return {}
    clustering = Clustering.load(config.text_root)
    clusters = [cluster_name(number) for number in range(len(clustering.centres))]
    if sorted(clusters) != sorted(names):
        return {}
    log_probs = forest.log_probs[[list(names).index(cluster) for cluster in clusters]]
    decode = Tokenizer.load(run.tokenizer).decode
    widths = {ROUTED.name: None} | {ROUTED_TOP_K.of(k): k for k in config.evaluate.top_k if k < len(clusters)}
    return {
        method: routed_mixture_log_probs(log_probs, text.tokens, forest.block_starts, clustering, decode, top_k=k)
        for method, k in widths.items()
    }
