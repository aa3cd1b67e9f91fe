"""The experts' weights in each average: one function per average in `forest/methods.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.evaluate.soups import soups
from btm_scale.forest.posterior.mixture import mean_tempered_weights
from btm_scale.forest.posterior.prior import cached_prior
from btm_scale.forest.priors import tempering_of
from btm_scale.forest.scores import Stack
from btm_scale.run_dir import RunDir


@dataclass(frozen=True)
class DevText:
    """The experts' scores on a domain's dev text."""

    config: RunConfig
    run: RunDir
    domain: str
    names: Sequence[str]  # of the experts
    scores: Stack  # their log-probabilities, nats [experts, tokens]
    log_prior: np.ndarray  # the domain's cached prior, nats [experts]


WeightFunction = Callable[[DevText], np.ndarray]
WEIGHTS: dict[str, WeightFunction] = {}


def average_weights(
    config: RunConfig, run: RunDir, names: Sequence[str], averages: Sequence[str], domain: str
) -> dict[str, np.ndarray]:
    """Return the experts' weights [experts] in each of a domain's averages; they sum to 1.

    Raises ForestError for missing scores, or before the members of a greedy soup are chosen.
    """
    scores = Stack.load(run, names, domain, "dev")
    dev = DevText(config, run, domain, names, scores, cached_prior(scores.log_probs, scores.block_starts))
    return {average: WEIGHTS[average](dev) for average in averages}


def average(function: WeightFunction) -> WeightFunction:
    """Register a function under its name. It returns non-negative weights [experts] that sum to 1."""
    WEIGHTS[function.__name__] = function
    return function


@average
def uniform(dev: DevText) -> np.ndarray:
    """Equal weights for all experts."""
    return np.full(len(dev.names), 1.0 / len(dev.names))


@average
def posterior(dev: DevText) -> np.ndarray:
    """The domain's prior (arXiv 2208.03306, section 4.3)."""
    prior: np.ndarray = np.exp(dev.log_prior)
    return prior / prior.sum()


@average
def tempered(dev: DevText) -> np.ndarray:
    """The mean of the tempered posterior over the dev text, of conversations over their answers."""
    tempering = tempering_of(dev.config.evaluate, lambda: dev.scores, dev.log_prior)
    scores = dev.scores
    return mean_tempered_weights(
        scores.log_probs, scores.block_starts, tempering, log_prior=dev.log_prior, counted=scores.counted
    )


@average
def greedy(dev: DevText) -> np.ndarray:
    """Equal weights for all members of the greedy soup (arXiv 2203.05482)."""
    members = soups(dev.config, dev.run)
    if members is None:
        raise ForestError(
            f"The members of the greedy soups are not chosen yet. Choose them first: btm-scale evaluate {dev.run.root}"
        )
    chosen = np.array([float(name in members[dev.domain]) for name in dev.names])
    return chosen / chosen.sum()
