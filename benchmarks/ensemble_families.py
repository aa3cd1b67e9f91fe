"""Families of ensemble weights. Each is a function of dev text, which it is tuned on, and of the text to predict.

Every family mixes the experts' probabilities with weights that depend on the earlier tokens of the block alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.gate import fitted_gate, gated_mixture_log_probs
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs, tempered_mixtures
from btm_scale.forest.posterior.prior import cached_prior, static_prior
from btm_scale.forest.posterior.tempering import fitted_tempering

_RATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)
_SHARES = (0.0, 0.003, 0.01, 0.03, 0.1)
_TEMPERINGS = [
    Tempering(power=power, forgetting=forgetting, share=share)
    for power in (0.05, 0.1, 0.2, 0.5)
    for forgetting in (0.9, 0.95, 0.98, 1.0)
    for share in (0.0, 0.03)
]


@dataclass(frozen=True)
class Text:
    """The experts' log-probabilities [experts, tokens] in nats, and the first token of each block."""

    log_probs: np.ndarray
    block_starts: np.ndarray
    counted: np.ndarray | None = None

    @property
    def likelihood_of(self) -> np.ndarray:
        """The tokens whose likelihood counts, bool [tokens]."""
        return np.ones(self.log_probs.shape[1], bool) if self.counted is None else self.counted


Family = Callable[[Text, Text], np.ndarray]  # dev text and text, to log-probabilities [tokens] of the text
Step = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # weights, p / mixture, and rate, to weights


def tempered(prior_of: Callable[[Text], np.ndarray]) -> Family:
    """The tempered posterior from a prior of dev text."""

    def family(dev: Text, text: Text) -> np.ndarray:
        prior = prior_of(dev)
        tempering = fitted_tempering(dev.log_probs, dev.block_starts, prior, dev.counted)
        return mixture_log_probs(
            text.log_probs, text.block_starts, log_prior=prior, mode="tempered", tempering=tempering
        )

    return family


def prefix(prior_of: Callable[[Text], np.ndarray]) -> Family:
    """The prefix posterior from a prior of dev text."""
    return lambda dev, text: mixture_log_probs(text.log_probs, text.block_starts, log_prior=prior_of(dev))


def fixed(dev: Text, text: Text) -> np.ndarray:
    """The static prior itself, at every token."""
    return mixture_log_probs(text.log_probs, text.block_starts, log_prior=static(dev), mode="fixed")


def multiplicative(step: Step) -> Family:
    """Weights that each token's p / mixture updates, with the rate and the share of the static prior of dev text."""
    settings = list(itertools.product(_RATES, _SHARES))

    def family(dev: Text, text: Text) -> np.ndarray:
        prior = np.exp(static(dev))
        likelihoods = _updated(dev, prior, settings, step)[:, dev.likelihood_of].mean(axis=1)
        return _updated(text, prior, [settings[int(np.argmax(likelihoods))]], step)[0]

    return family


def soft_bayes(weights: np.ndarray, ratios: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """w (1 - rate + rate p / mixture) (arXiv 1702.06829)."""
    updated: np.ndarray = weights * (1.0 - rate + rate * ratios)
    return updated


def exponentiated_gradient(weights: np.ndarray, ratios: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """w exp(rate p / mixture), normalised."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights) + rate * ratios
    return np.exp(log_weights - logsumexp(log_weights))


def over_temperings(dev_prior: bool) -> Family:
    """A Bayesian mixture of tempered mixtures, from equal weights or from their prior of dev text's blocks."""

    def family(dev: Text, text: Text) -> np.ndarray:
        prior, weights = static(dev), None
        if dev_prior:
            mixtures = tempered_mixtures(dev.log_probs, dev.block_starts, _TEMPERINGS, log_prior=prior)
            weights = static_prior(mixtures, dev.counted)
        mixtures = tempered_mixtures(text.log_probs, text.block_starts, _TEMPERINGS, log_prior=prior)
        return mixture_log_probs(mixtures, text.block_starts, log_prior=weights)

    return family


def gate(dev: Text, text: Text) -> np.ndarray:
    """The gated mixture from the static prior."""
    prior = static(dev)
    fitted = fitted_gate(dev.log_probs, dev.block_starts, prior, dev.counted)
    return gated_mixture_log_probs(text.log_probs, text.block_starts, fitted, log_prior=prior)


def stack(dev: Text, text: Text) -> np.ndarray:
    """A fixed mixture of other families, with the weights of the highest likelihood of dev text."""
    families = (tempered(static), multiplicative(soft_bayes), gate, prefix(static))
    weights = static_prior(np.minimum([family(dev, dev) for family in families], 0.0), dev.counted)
    mixtures = np.minimum([family(dev, text) for family in families], 0.0)
    return mixture_log_probs(mixtures, text.block_starts, log_prior=weights, mode="fixed")


def cached(dev: Text) -> np.ndarray:
    """The cached prior."""
    return cached_prior(dev.log_probs, dev.block_starts)


def static(dev: Text) -> np.ndarray:
    """The static prior."""
    return static_prior(dev.log_probs, dev.counted)


FAMILIES: Mapping[str, Family] = {
    "prefix": prefix(cached),
    "tempered": tempered(cached),
    "tempered, static prior": tempered(static),
    "prefix, static prior": prefix(static),
    "static prior alone": fixed,
    "soft-bayes": multiplicative(soft_bayes),
    "exponentiated gradient": multiplicative(exponentiated_gradient),
    "mixture of temperings": over_temperings(dev_prior=False),
    "mixture of temperings, dev prior": over_temperings(dev_prior=True),
    "gate": gate,
    "stack": stack,
}


def _updated(text: Text, prior: np.ndarray, settings: Sequence[tuple[float, float]], step: Step) -> np.ndarray:
    """Return the mixtures [settings, tokens] of weights that are updated token by token, from the prior [experts]."""
    rates, shares = (np.array(values)[:, None] for values in zip(*settings, strict=True))
    result = np.empty((len(settings), text.log_probs.shape[1]))
    for columns, block in _by_length(text):  # [experts, blocks, tokens]
        weights = np.broadcast_to(prior[:, None, None], (len(prior), len(settings), block.shape[1])).copy()
        rest = shares * prior[:, None, None]
        for token in range(block.shape[2]):
            peak = block[:, :, token].max(axis=0)
            probabilities = np.exp(block[:, :, token] - peak)[:, None]
            mixture = (weights * probabilities).sum(axis=0)
            result[:, columns[:, token]] = np.log(mixture) + peak
            weights = (1.0 - shares) * step(weights, probabilities / mixture, rates) + rest
    return result


def _by_length(text: Text) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (columns [blocks, tokens], log-probabilities [experts, blocks, tokens]) of the blocks of each length."""
    ends = np.append(text.block_starts[1:], text.log_probs.shape[1])
    lengths = ends - text.block_starts
    groups = []
    for length in np.unique(lengths):
        columns = text.block_starts[lengths == length][:, None] + np.arange(length)
        groups.append((columns, text.log_probs[:, columns]))
    return groups
