"""What a run knows of text that nobody has named a domain for: which of its models, and how likely each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from btm_scale.config.evaluation import EvaluateConfig, Tempering
from btm_scale.config.run import RunConfig
from btm_scale.data.clustering import Clustering
from btm_scale.errors import ForestError, UserError
from btm_scale.forest.expert import read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.posterior.routing import router
from btm_scale.forest.posterior.tempering import fitted_tempering
from btm_scale.forest.scores import Stack, dev_prior
from btm_scale.run_dir import RunDir

PRIORS = ("cached", "uniform", "routed")


def models_of(run: RunDir, asked: Sequence[str]) -> list[str]:
    """The models to use: those asked for, or the whole forest. Raises ForestError for one that isn't there."""
    names = list(dict.fromkeys(asked)) or list(experts(run))
    if not names:
        raise ForestError(f"no expert in {run.experts}; train some first: btm-scale run CONFIG")
    for name in names:
        read_expert(run.model(name))
    return names


def log_prior_of(config: RunConfig, run: RunDir, names: Sequence[str], prior: str, domain: str | None) -> np.ndarray:
    """log p(D=j), nats [models]: of a domain's dev text, the mean over all training domains', or uniform (which also
    stands for `routed`, where each text has a prior of its own).

    Raises UserError for a prior or domain that the run doesn't have, ForestError for models without scores.
    """
    if prior not in PRIORS:
        raise UserError(f"no prior is called '{prior}'; choose one of {', '.join(PRIORS)}")
    if domain is not None and prior != "cached":
        raise UserError(f"the prior '{prior}' is of no domain; leave out --domain {domain}, or use the cached prior")
    if prior != "cached" or len(names) == 1:
        return np.full(len(names), -np.log(len(names)))
    domains = _domains(config, domain)
    probabilities = np.mean([np.exp(dev_prior(run, names, name)) for name in domains], axis=0)
    return np.log(probabilities)


def router_of(
    config: RunConfig, names: Sequence[str], prior: str, top_k: int | None
) -> Callable[[Sequence[str]], np.ndarray] | None:
    """What gives each text its prior, for the prior `routed`: the clustering that lies beside the run's text.

    Raises UserError, DataError or ForestError if the run's domains are not those of a clustering.
    """
    if prior != "routed":
        if top_k is not None:
            raise UserError(f"--route-top-k {top_k} is of the prior 'routed', and the prior is '{prior}'; leave it out")
        return None
    if top_k is not None and top_k < 1:
        raise UserError(f"--route-top-k {top_k}: at least 1 expert must be left")
    return router(Clustering.load(config.text_root), names, top_k)


def generation_tempering(
    config: RunConfig, run: RunDir, names: Sequence[str], log_prior: np.ndarray, domain: str | None
) -> Tempering:
    """The tempered posterior's numbers: the config's, or fitted to the dev text that the prior is of."""
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
        raise UserError(f"the run has no domain '{domain}'; it has {', '.join(config.all_domains)}")
    return [domain]


def tempering_of(settings: EvaluateConfig, dev: Callable[[], Stack], log_prior: np.ndarray) -> Tempering:
    """The tempering that is given, or that which fits dev text (asked for only then); `log_prior` [experts] nats."""
    if settings.tempering is not None:
        return settings.tempering
    text = dev()
    return fitted_tempering(text.log_probs, text.block_starts, log_prior)
