"""A log-linear gate: weights from decaying sums of the log-probabilities so far, with coefficients of dev text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from btm_scale.forest.posterior.log_weights import checked, log_of, logsumexp, normalised_prior
from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.util.records import Finite, Part

Array = np.ndarray

# The evidence of token s for token t is multiplied by forgetting^(t - s - 1): from the last token alone to the prefix.
FORGETTINGS = (0.0, 0.7, 0.9, 0.97, 1.0)
_START = (1.0, 0.0, 0.0, 0.0, 0.1, 0.0)  # nearly the tempered posterior with power 0.1 and forgetting 0.97
_SHARES = (0.0, 0.01, 0.03, 0.1)
_LEAST = -100.0  # nats: an expert that excludes a token can recover
_STEPS, _SETTLED = 60, 1e-7  # of the ascent, and nats per token that the last one gains
_AT_ONCE = 2**19  # elements of the features that a mixture processes at once
_FITTED = 2**18  # log-probabilities that are enough for six numbers


class Gate(Part):
    """What is fitted to dev text: see `gated_mixture_log_probs`."""

    coefficients: tuple[Finite, Finite, Finite, Finite, Finite, Finite]  # of the log prior and of each decaying sum
    share: float = Field(ge=0, lt=1)  # weight of the prior, mixed in before each token


def fitted_gate(log_probs: Array, block_starts: Array, log_prior: Array, counted: Array | None = None) -> Gate:
    """Return the gate with the highest likelihood of dev text.

    Long text is fitted by some of its blocks, at equal distances, so that the time of a fit has a limit.

    Args: `log_probs` [experts, tokens] and `log_prior` [experts] in nats, `block_starts` [blocks], and `counted`, the
    tokens whose likelihood it is, bool [tokens] (default: all).
    """
    text, prior = checked(log_probs), normalised_prior(log_prior, len(log_probs))
    blocks = np.array(blocks_of(block_starts, text.shape[1]))[:: -(-text.size // _FITTED)]
    columns = np.concatenate([np.arange(*block) for block in blocks])
    lengths = blocks[:, 1] - blocks[:, 0]
    starts, text = np.cumsum(lengths) - lengths, text[:, columns]
    seen = np.isfinite(text.max(axis=0)) & (True if counted is None else counted[columns])
    if not seen.any():
        return Gate(coefficients=_START, share=0.0)
    parts = [features for _, features in _features(text, starts, prior, _AT_ONCE)]
    features, text = np.concatenate(parts, axis=2)[:, :, seen], text[:, seen]
    coefficients = _ascended(features, text)
    likelihoods = [_gated(features, text, coefficients, prior, share).mean() for share in _SHARES]
    return Gate(coefficients=tuple(coefficients.tolist()), share=_SHARES[int(np.argmax(likelihoods))])


def gated_mixture_log_probs(log_probs: Array, block_starts: Array, gate: Gate, *, log_prior: Array) -> Array:
    """Return the log-probability in nats of every token under the gated mixture, float64 [tokens].

    The weights are proportional to exp(b_0 log prior_j + sum_k b_k E_kj), where E_kj is the sum of expert j's
    log-probabilities of the earlier tokens of the block, decaying by FORGETTINGS[k]; then the prior is mixed in with
    weight `gate.share`. Arguments as of `mixture_log_probs`, with a prior that gives every expert weight.
    """
    text, prior = checked(log_probs), normalised_prior(log_prior, len(log_probs))
    coefficients = np.array(gate.coefficients)
    parts = [
        _gated(features, text[:, columns], coefficients, prior, gate.share)
        for columns, features in _features(text, block_starts, prior, _AT_ONCE)
    ]
    return np.minimum(np.concatenate(parts), 0.0)


def _features(text: Array, starts: Array, log_prior: Array, at_once: int) -> Iterator[tuple[slice, Array]]:
    """Yield the features before each token, [1 + sums, experts, tokens], of blocks with `at_once` elements."""
    blocks = blocks_of(starts, text.shape[1])
    most = max(1, at_once // (len(text) * (1 + len(FORGETTINGS))))  # tokens
    first = 0
    while first < len(blocks):
        last = first + 1
        while last < len(blocks) and blocks[last][1] - blocks[first][0] <= most:
            last += 1
        columns = slice(blocks[first][0], blocks[last - 1][1])
        yield columns, _of_blocks(text[:, columns], np.array(blocks[first:last]) - columns.start, log_prior)
        first = last


def _of_blocks(text: Array, blocks: Array, log_prior: Array) -> Array:
    features = np.empty((1 + len(FORGETTINGS), *text.shape))
    features[0] = np.maximum(log_prior, _LEAST)[:, None]
    evidence = np.maximum(text, _LEAST)
    evidence -= evidence.mean(axis=0)  # what all experts share has no effect on the weights
    forgettings = np.array(FORGETTINGS)[:, None, None]
    lengths = blocks[:, 1] - blocks[:, 0]
    for length in np.unique(lengths):
        columns = blocks[lengths == length, 0][:, None] + np.arange(length)
        piece = evidence[:, columns]  # [experts, blocks, tokens]
        totals = np.zeros((len(FORGETTINGS), *piece.shape[:2]))
        for token in range(length):
            features[1:, :, columns[:, token]] = totals
            totals = forgettings * totals + piece[:, :, token]
    return features


def _ascended(features: Array, text: Array) -> Array:
    """Return the coefficients of the highest likelihood, by steps along the gradient scaled by the weights' spread."""
    best, highest = np.array(_START), -np.inf
    tried, damping = best, 1.0
    gradient, spread = np.zeros(len(best)), np.eye(len(best))
    for _ in range(_STEPS):
        likelihood, steeper, wider = _slopes(features, text, tried)
        if likelihood > highest:
            gain, best, highest = likelihood - highest, tried, likelihood
            if gain < _SETTLED:
                break
            damping = max(damping / 3.0, 1e-3)
            gradient, spread = steeper, wider
        else:
            damping *= 4.0
        ridge = damping * np.diag(np.maximum(np.diag(spread), 1e-9))
        tried = best + np.linalg.solve(spread + ridge, gradient)
    return best


def _slopes(features: Array, text: Array, coefficients: Array) -> tuple[float, Array, Array]:
    """Return the likelihood in nats per token, and its gradient and the spread of the features, summed over tokens."""
    scores = np.tensordot(coefficients, features, 1)
    normaliser, joint = logsumexp(scores), scores + text
    total = logsumexp(joint)
    weights = np.exp(scores - normaliser)
    mean = np.einsum("fet,et->ft", features, weights)
    gradient = np.einsum("fet,et->f", features, np.exp(joint - total) - weights)
    spread = np.einsum("fet,get,et->fg", features, features, weights, optimize=True) - mean @ mean.T
    return float(np.mean(total - normaliser)), gradient, spread


def _gated(features: Array, text: Array, coefficients: Array, log_prior: Array, share: float) -> Array:
    scores = np.tensordot(coefficients, features, 1)
    weights = (1.0 - share) * np.exp(scores - logsumexp(scores)) + share * np.exp(log_prior)[:, None]
    return logsumexp(log_of(weights) + text)
