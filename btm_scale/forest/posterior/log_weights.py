"""Log-probabilities and log weights of experts, which are the first dimension: checked, summed, normalised, cut."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def logsumexp(values: Array) -> Array:
    """Over the first dimension; -inf where all are -inf."""
    peak = values.max(axis=0)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    shifted = values - safe
    np.exp(shifted, out=shifted)
    with np.errstate(divide="ignore"):
        return safe + np.log(shifted.sum(axis=0))


def checked(log_probs: Array) -> Array:
    """Log-probabilities as float64. Raises ValueError for one above 0 or NaN."""
    values = np.asarray(log_probs, dtype=np.float64)
    # NaN fails every comparison, so this catches it too.
    if values.size and not values.max() <= 0:
        raise ValueError("log-probabilities must be at most 0 and never NaN; score the experts again")
    return values


def log_of(probabilities: Array) -> Array:
    """Natural logarithms; -inf of 0."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def centred(log_weights: Array) -> Array:
    """The same weights up to a factor, the largest of each column 1: however long a stream, it loses no digits."""
    peak = log_weights.max(axis=0)
    return log_weights - np.where(np.isfinite(peak), peak, 0.0)


def normalise(log_weights: Array, prior: Array) -> Array:
    """In place: each column [experts] of log weights [experts, columns...] sums to 1.

    Where every expert has ruled the text out there is nothing to weigh by but the prior [experts, columns].
    """
    total = logsumexp(log_weights)
    lost = np.isneginf(total)
    if lost.any():
        fallback = prior.reshape(prior.shape + (1,) * (log_weights.ndim - prior.ndim))
        np.copyto(log_weights, fallback, where=lost)
        total[lost] = 0.0
    log_weights -= total
    return log_weights


def keep_largest(log_weights: Array, count: int | None) -> None:
    """In place: the `count` largest weights of each column stay (ties go to the first), the others are -inf."""
    if count is not None and count < len(log_weights):
        outside = np.argsort(-log_weights, axis=0, kind="stable")[count:]
        np.put_along_axis(log_weights, outside, -np.inf, axis=0)


def normalised_prior(log_prior: Array | None, experts: int, top_k: int | None = None) -> Array:
    """A prior [experts], uniform by default, of the `top_k` largest alone. Raises ValueError for one of no weight."""
    prior = np.zeros(experts) if log_prior is None else np.array(log_prior, dtype=np.float64)
    if prior.shape != (experts,) or np.isnan(prior).any() or not np.isfinite(prior).any():
        raise ValueError(f"a prior over {experts} experts must be {experts} log-probabilities, not {log_prior}")
    keep_largest(prior, top_k)
    return prior - logsumexp(prior)
