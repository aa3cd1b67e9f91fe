"""The domain posterior, its prior, and the mixture that they make of the experts (arXiv 2208.03306, section 2.3).

Everything is arithmetic on log-probabilities [experts, tokens], float64 inside: a mixture of text under
E experts needs only the E numbers that each gave to each token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np

Mode = Literal["prefix", "token", "fixed"]
Array = np.ndarray

# Weight of the newest posterior in the moving average that becomes the prior (the paper's appendix).
PRIOR_DECAY = 0.3


def mixture_log_probs(
    log_probs: Array,
    block_starts: Array,
    *,
    log_prior: Array | None = None,
    mode: Mode = "prefix",
    top_k: int | None = None,
) -> Array:
    """Log-probability in nats of every token under the mixture, float64 [tokens].

    p(x_t) = sum_j w_j(t) p_j(x_t), with weights that start from the prior at each block and are

    - `prefix`: proportional to prior_j x product of p_j over all earlier tokens of the block (the paper's formula);
    - `token`: proportional to prior_j x p_j of the one token before (what the paper's released code computes);
    - `fixed`: the prior itself.

    `log_probs` [experts, tokens] nats; `block_starts` [blocks] the first token of each block, ascending from 0;
    `log_prior` [experts] nats (default: uniform; normalised here); `top_k`: only so many experts of the largest prior
    take part (ties go to the first).

    Raises ValueError for a log-probability above 0 or NaN, or a prior that weighs nobody.
    """
    values = _checked(log_probs)
    prior = _normalised_prior(log_prior, len(values), top_k)
    active = np.isfinite(prior)
    values, prior = values[active], prior[active]
    result = np.empty(values.shape[1])
    for begin, end in _blocks(block_starts, values.shape[1]):
        block = values[:, begin:end]
        result[begin:end] = _logsumexp(_log_weights(block, prior, mode) + block)
    return np.minimum(result, 0.0)


def block_posterior(block: Array, log_prior: Array) -> Array:
    """log p(D=j | the whole block), nats [experts], from log-probabilities [experts, tokens] and a prior [experts]."""
    joint = log_prior + block.sum(axis=1)
    return joint - _logsumexp(joint)


def cached_prior(log_probs: Array, block_starts: Array) -> Array:
    """log p(D=j) [experts]: a moving average of the posteriors of successive blocks, started uniform, then frozen.

    Each block's posterior is taken under the prior so far; prior <- 0.7 prior + 0.3 posterior.
    """
    values = _checked(log_probs)
    prior = np.full(len(values), 1.0 / len(values))
    for begin, end in _blocks(block_starts, values.shape[1]):
        prior = updated_prior(prior, values[:, begin:end])
    return _log(prior)


def updated_prior(prior: Array, block: Array) -> Array:
    """The prior [experts] (probabilities) after one more block [experts, tokens]."""
    posterior = np.exp(block_posterior(block, _log(prior)))
    return (1.0 - PRIOR_DECAY) * prior + PRIOR_DECAY * posterior


def updating_mixture_log_probs(log_probs: Array, block_starts: Array, *, log_prior: Array) -> Array:
    """`mixture_log_probs` of the prefix posterior with a prior that goes on moving after every block."""
    values = _checked(log_probs)
    prior = np.exp(log_prior)
    result = np.empty(values.shape[1])
    for begin, end in _blocks(block_starts, values.shape[1]):
        block = values[:, begin:end]
        result[begin:end] = mixture_log_probs(block, np.zeros(1, np.int64), log_prior=_log(prior))
        prior = updated_prior(prior, block)
    return result


def _log_weights(block: Array, log_prior: Array, mode: Mode) -> Array:
    """Normalised log weights before each token of one block, [experts, tokens]."""
    evidence = np.zeros_like(block)
    if mode == "prefix":
        np.cumsum(block[:, :-1], axis=1, out=evidence[:, 1:])
    elif mode == "token":
        evidence[:, 1:] = block[:, :-1]
    joint = log_prior[:, None] + evidence
    total = _logsumexp(joint)
    # Where every expert has ruled the text out there is nothing to weigh by but the prior.
    lost = np.isneginf(total)
    joint[:, lost] = log_prior[:, None]
    total[lost] = _logsumexp(log_prior[:, None])
    return joint - total


def _normalised_prior(log_prior: Array | None, experts: int, top_k: int | None) -> Array:
    prior = np.zeros(experts) if log_prior is None else np.array(log_prior, dtype=np.float64)
    if prior.shape != (experts,) or np.isnan(prior).any() or not np.isfinite(prior).any():
        raise ValueError(
            f"a prior over {experts} experts must be {experts} log-probabilities, not {log_prior}"
        )
    if top_k is not None and top_k < experts:
        outside = np.argsort(-prior, kind="stable")[top_k:]
        prior[outside] = -np.inf
    return prior - _logsumexp(prior)


def _checked(log_probs: Array) -> Array:
    values = np.asarray(log_probs, dtype=np.float64)
    if np.isnan(values).any() or (values > 0).any():
        raise ValueError("log-probabilities must be at most 0 and never NaN; score the experts again")
    return values


def _blocks(starts: Array, tokens: int) -> list[tuple[int, int]]:
    bounds = [*map(int, starts), tokens]
    if bounds[0] != 0 or any(end <= begin for begin, end in pairwise(bounds)):
        raise ValueError(f"block starts must ascend from 0 below {tokens}, not {list(starts[:3])}...")
    return list(pairwise(bounds))


def _logsumexp(values: Array) -> Array:
    """Over the first dimension; -inf where all are -inf."""
    peak = values.max(axis=0)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe).sum(axis=0))


def _log(probabilities: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)
