"""Operations on log-probabilities and log weights whose first dimension is the experts."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def logsumexp(values: Array) -> Array:
    """Return the log-sum-exp over the first dimension; -inf where all values are -inf."""
    peak = values.max(axis=0)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    shifted = values - safe
    np.exp(shifted, out=shifted)
    with np.errstate(divide="ignore"):
        return safe + np.log(shifted.sum(axis=0))


def checked(log_probs: Array) -> Array:
    """Return log-probabilities as float64. Raises ValueError if one is above 0 or NaN."""
    values = np.asarray(log_probs, dtype=np.float64)
    # NaN fails every comparison, so this catches it too.
    if values.size and not values.max() <= 0:
        raise ValueError("Log-probabilities must be at most 0 and not NaN. Score the experts again.")
    return values


def log_of(probabilities: Array) -> Array:
    """Return natural logarithms; -inf for 0."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def centred(log_weights: Array) -> Array:
    """Scale the largest weight of each column to 1, so that no precision is lost over long streams."""
    peak = log_weights.max(axis=0)
    return log_weights - np.where(np.isfinite(peak), peak, 0.0)


def normalise(log_weights: Array, prior: Array) -> Array:
    """Normalise log weights [experts, columns...] in place, so that the weights of each column sum to 1.

    Columns in which every weight is 0 become the prior [experts, columns].
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
    """Set all but the `count` largest weights of each column to -inf in place (ties go to the first)."""
    if count is not None and count < len(log_weights):
        outside = np.argsort(-log_weights, axis=0, kind="stable")[count:]
        np.put_along_axis(log_weights, outside, -np.inf, axis=0)


def normalised_prior(log_prior: Array | None, experts: int, top_k: int | None = None) -> Array:
    """Return a normalised log prior [experts], default uniform, over its `top_k` largest.

    Raises ValueError if the prior has another shape, NaN or no weight.
    """
    prior = np.zeros(experts) if log_prior is None else np.array(log_prior, dtype=np.float64)
    if prior.shape != (experts,) or np.isnan(prior).any() or not np.isfinite(prior).any():
        raise ValueError(f"a prior over {experts} experts must be {experts} log-probabilities, not {log_prior}")
    keep_largest(prior, top_k)
    return prior - logsumexp(prior)
