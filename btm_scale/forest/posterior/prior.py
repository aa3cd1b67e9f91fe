"""The prior p(D=j): uniform, cached, static, or updated block by block (arXiv 2208.03306, section 2.3)."""

from __future__ import annotations

import numpy as np

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.evidence import Mode
from btm_scale.forest.posterior.log_weights import checked, log_of
from btm_scale.forest.posterior.mixture import block_posterior, blocks_of, mixture_log_probs

Array = np.ndarray

# Weight of the newest posterior in the moving average that becomes the prior (the paper's appendix).
PRIOR_DECAY = 0.3
# Of the static prior's expectation maximization.
_PASSES = 500
_SETTLED = 1e-7  # nats per token gained in a pass


def cached_prior(log_probs: Array, block_starts: Array) -> Array:
    """Return log p(D=j) [experts] in nats: the moving average of the posteriors of successive blocks, from uniform.

    Each block's posterior uses the prior so far; prior <- 0.7 prior + 0.3 posterior.
    """
    prior = np.full(len(log_probs), 1.0 / len(log_probs))
    for begin, end in blocks_of(block_starts, log_probs.shape[1]):
        prior = updated_prior(prior, checked(log_probs[:, begin:end]))
    return log_of(prior)


def static_prior(log_probs: Array, counted: Array | None = None) -> Array:
    """Return log p(D=j) [experts] in nats: the fixed mixture weights that give the text the highest likelihood.

    They are found by expectation maximization from equal weights. Each expert counts as one token more than the text
    gives it, so that no weight is 0.

    Args: `log_probs` [experts, tokens] in nats, and `counted`, the tokens of the likelihood, bool [tokens] (default:
    all).
    """
    text = checked(log_probs if counted is None else log_probs[:, counted])
    peak = text.max(axis=0)
    possible = np.isfinite(peak)  # a token that no expert allows says nothing about the weights
    likelihood = np.exp(text[:, possible] - peak[possible])
    experts, tokens = likelihood.shape
    prior = np.full(experts, 1.0 / experts)
    before = -np.inf
    for _ in range(_PASSES if tokens else 0):
        mixture = prior @ likelihood
        after = float(np.mean(np.log(mixture)))
        prior = (prior * (likelihood @ (1.0 / mixture)) + 1.0) / (tokens + experts)
        if after - before < _SETTLED:
            break
        before = after
    return log_of(prior)


def updated_prior(prior: Array, block: Array) -> Array:
    """Return the prior [experts], as probabilities, after one more block [experts, tokens]."""
    posterior = np.exp(block_posterior(block, log_of(prior)))
    return (1.0 - PRIOR_DECAY) * prior + PRIOR_DECAY * posterior


def updating_mixture_log_probs(
    log_probs: Array,
    block_starts: Array,
    *,
    log_prior: Array,
    mode: Mode = "prefix",
    tempering: Tempering | None = None,
) -> Array:
    """Return `mixture_log_probs` with a prior that is updated after every block."""
    prior = np.exp(log_prior)
    result = np.empty(log_probs.shape[1])
    for begin, end in blocks_of(block_starts, log_probs.shape[1]):
        block = checked(log_probs[:, begin:end])
        result[begin:end] = mixture_log_probs(
            block, np.zeros(1, np.int64), log_prior=log_of(prior), mode=mode, tempering=tempering
        )
        prior = updated_prior(prior, block)
    return result
