"""Experts weighed by where a text lies among clusters, not by what they say of it (c-BTM, arXiv 2303.14177)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from btm_scale.data.clustering import Clustering, squared_distances
from btm_scale.data.discover import cluster_name
from btm_scale.errors import ForestError
from btm_scale.forest.posterior.log_weights import checked, keep_largest, logsumexp
from btm_scale.forest.posterior.mixture import blocks_of

ROUTING_TEMPERATURE = 0.1
_AT_ONCE = 1024  # texts placed at a time


def routed_mixture_log_probs(
    log_probs: np.ndarray,
    tokens: np.ndarray,
    block_starts: np.ndarray,
    clustering: Clustering,
    decode: Callable[[Sequence[int]], str],
    *,
    top_k: int | None = None,
    temperature: float = ROUTING_TEMPERATURE,
    every: int = 32,
) -> np.ndarray:
    """Log-probability in nats of every target under the routed mixture, float64 [targets].

    `log_probs` [clusters, targets] of the clusters' experts, in the clusters' order; `tokens` [targets + 1]. The
    weights follow from the text of the block before a target, placed anew every so many tokens.
    """
    if len(log_probs) != len(clustering.centres):
        raise ForestError(
            f"{len(log_probs)} experts cannot be routed by {len(clustering.centres)} clusters; give each cluster one"
        )
    places = [
        (begin, first, min(first + every, end))
        for begin, end in blocks_of(block_starts, log_probs.shape[1])
        for first in range(begin, end, every)
    ]
    result = np.empty(log_probs.shape[1])
    for start in range(0, len(places), _AT_ONCE):
        batch = places[start : start + _AT_ONCE]
        texts = [decode(tokens[begin : first + 1].tolist()) for begin, first, _ in batch]
        weights = log_weights(clustering, texts, temperature=temperature, top_k=top_k).astype(np.float64)
        for (_, first, last), row in zip(batch, weights, strict=True):
            result[first:last] = logsumexp(row[:, None] + checked(log_probs[:, first:last]))
    return np.minimum(result, 0.0)


def log_weights(
    clustering: Clustering, texts: Sequence[str], *, temperature: float = ROUTING_TEMPERATURE, top_k: int | None = None
) -> np.ndarray:
    """How c-BTM routes: log softmax(-distance^2 / temperature) over clusters, nats, float32 [texts, clusters].

    With `top_k` only this many of the nearest keep weight (ties go to the first).
    """
    scores: np.ndarray = -squared_distances(clustering.place(texts), clustering.centres) / temperature
    keep_largest(scores.T, top_k)
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def router(
    clustering: Clustering, names: Sequence[str], top_k: int | None = None
) -> Callable[[Sequence[str]], np.ndarray]:
    """A prior for each text: log weights [texts, experts] of experts that are named as the clusters are.

    Raises ForestError for an expert of no cluster.
    """
    clusters = [cluster_name(number) for number in range(len(clustering.centres))]
    if strange := [name for name in names if name not in clusters]:
        raise ForestError(
            f"'{strange[0]}' is none of the clustering's {len(clusters)} clusters, so no text is routed to it; use "
            "another prior, or experts of the domains that `discover` found"
        )
    columns = [clusters.index(name) for name in names]

    def log_prior(texts: Sequence[str]) -> np.ndarray:
        weights = log_weights(clustering, texts).astype(np.float64)[:, columns].T
        keep_largest(weights, top_k)
        return (weights - logsumexp(weights)).T

    return log_prior
