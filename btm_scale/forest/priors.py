"""Priors for text without a known domain: the models to mix, and the prior probability of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from btm_scale.config.evaluation import EvaluateConfig, Tempering
from btm_scale.config.run import RunConfig
from btm_scale.data.clustering import Clustering
from btm_scale.errors import ForestError, UserError, unknown_name
from btm_scale.forest.expert import read_expert
from btm_scale.forest.forest import require_experts
from btm_scale.forest.posterior.routing import router
from btm_scale.forest.posterior.tempering import fitted_tempering
from btm_scale.forest.scores import DevPrior, Stack, dev_prior
from btm_scale.run_dir import RunDir, finished_models

PRIORS = ("cached", "static", "uniform", "routed")


def models_of(run: RunDir, asked: Sequence[str]) -> list[str]:
    """Return the models to use: the requested ones, or the forest. Raises ForestError for a missing one."""
    names = list(dict.fromkeys(asked)) or list(require_experts(run))
    finished = finished_models(run)
    if not finished:
        raise ForestError(f"There is no finished model in {run.root}. Train some first: btm-scale run CONFIG")
    if unknown := [name for name in names if name not in finished]:
        raise ForestError(unknown_name("model", unknown[0], finished))
    for name in names:
        read_expert(run.model(name))
    return names


def log_prior_of(config: RunConfig, run: RunDir, names: Sequence[str], prior: str, domain: str | None) -> np.ndarray:
    """Return log p(D=j) [models] in nats: the prior of a domain's dev text, the mean over all training domains, or
    uniform (also for `routed`, where each text has its own prior).

    Raises UserError for an unknown prior or domain, ForestError for models without scores.
    """
    if prior not in PRIORS:
        raise UserError(unknown_name("prior", prior, PRIORS))
    estimated: DevPrior | None = "cached" if prior == "cached" else "static" if prior == "static" else None
    if estimated is not None:
        if len(names) == 1:
            return np.zeros(1)
        domains = _domains(config, domain)
        probabilities = np.mean([np.exp(dev_prior(run, names, name, estimated)) for name in domains], axis=0)
        return np.log(probabilities)
    if domain is not None:
        raise UserError(
            f"The prior '{prior}' does not depend on a domain. Remove --domain {domain}, or use the cached or static "
            "prior."
        )
    return np.full(len(names), -np.log(len(names)))


def router_of(
    config: RunConfig, names: Sequence[str], prior: str, top_k: int | None
) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Return the function that gives each text its prior if `prior` is `routed`, from the clustering of the run's text.

    Raises UserError, DataError or ForestError if the run's domains are not those of a clustering.
    """
    if prior != "routed":
        if top_k is not None:
            raise UserError(
                f"--route-top-k {top_k} needs the prior 'routed', not '{prior}'. Remove it, or set --prior routed."
            )
        return None
    if top_k is not None and top_k < 1:
        raise UserError(f"--route-top-k {top_k} is not a positive number. Keep at least 1 expert.")
    return router(Clustering.load(config.text_root), names, top_k)


def generation_tempering(
    config: RunConfig, run: RunDir, names: Sequence[str], log_prior: np.ndarray, domain: str | None
) -> Tempering:
    """Return the tempering of the config, or one that is fitted to the dev text of the prior."""
    domains = _domains(config, domain)
    return tempering_of(
        config.evaluate,
        lambda: Stack.joined([Stack.load(run, names, one, "dev") for one in domains]),
        log_prior,
    )


def _domains(config: RunConfig, domain: str | None) -> list[str]:
    if domain is None:
        return list(config.domains)
    if domain not in config.all_domains:
        raise UserError(unknown_name("domain", domain, config.all_domains))
    return [domain]


def tempering_of(settings: EvaluateConfig, dev: Callable[[], Stack], log_prior: np.ndarray) -> Tempering:
    """Return the tempering in `settings`, or one fitted to `dev` text, which is loaded only then.

    `log_prior` [experts] in nats.
    """
    if settings.tempering is not None:
        return settings.tempering
    text = dev()
    return fitted_tempering(text.log_probs, text.block_starts, log_prior, text.counted)
