"""Weight experts by the distance of a text to their clusters, not by likelihood (c-BTM, arXiv 2303.14177)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from btm_scale.data.clustering import Clustering, squared_distances
from btm_scale.data.discover import cluster_name
from btm_scale.errors import ForestError
from btm_scale.forest.posterior.log_weights import checked, keep_largest, logsumexp
from btm_scale.forest.posterior.mixture import blocks_of

ROUTING_TEMPERATURE = 0.1
_AT_ONCE = 1024  # texts embedded at a time


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
    """Return the log-probability in nats of every target under the routed mixture, float64 [targets].

    `log_probs` [clusters, targets] of the clusters' experts, in the clusters' order; `tokens` [targets + 1]. The
    weights depend on the text of the block before a target, and are updated `every` tokens.
    """
    if len(log_probs) != len(clustering.centres):
        raise ForestError(
            f"Cannot route {len(log_probs)} experts by {len(clustering.centres)} clusters. Give exactly one expert per "
            "cluster."
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
    """Return c-BTM's weights, log softmax(-distance^2 / temperature) over clusters, nats, float32 [texts, clusters].

    With `top_k`, only this many of the nearest clusters keep weight (ties go to the first).
    """
    scores: np.ndarray = -squared_distances(clustering.place(texts), clustering.centres) / temperature
    keep_largest(scores.T, top_k)
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def router(
    clustering: Clustering, names: Sequence[str], top_k: int | None = None
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function that gives each text a prior: log weights [texts, experts] of experts named like the clusters.

    Raises ForestError for an expert without a cluster, and DataError if scikit-learn is not installed.
    """
    clusters = [cluster_name(number) for number in range(len(clustering.centres))]
    if unrouted := [name for name in names if name not in clusters]:
        raise ForestError(
            f"'{unrouted[0]}' is not one of the clustering's {len(clusters)} clusters, so no text is routed to it. Use "
            "another prior, or experts of domains created by `btm-scale discover`."
        )
    columns = [clusters.index(name) for name in names]
    clustering.place([""])  # imports scikit-learn, which would take seconds of the first text

    def log_prior(texts: Sequence[str]) -> np.ndarray:
        weights = log_weights(clustering, texts).astype(np.float64)[:, columns].T
        keep_largest(weights, top_k)
        return (weights - logsumexp(weights)).T

    return log_prior
