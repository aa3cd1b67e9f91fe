"""Experts weighed by where a text lies among clusters, not by what they say of it (c-BTM, arXiv 2303.14177)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from btm_scale.data.clustering import ROUTING_TEMPERATURE, Clustering
from btm_scale.data.discover import cluster_name
from btm_scale.errors import ForestError
from btm_scale.forest.posterior.evidence import logsumexp
from btm_scale.forest.posterior.mixture import blocks_of, checked

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
        weights = clustering.log_weights(texts, temperature=temperature, top_k=top_k).astype(np.float64)
        for (_, first, last), row in zip(batch, weights, strict=True):
            result[first:last] = logsumexp(row[:, None] + checked(log_probs[:, first:last]))
    return np.minimum(result, 0.0)


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
        weights = clustering.log_weights(texts).astype(np.float64)[:, columns]
        if top_k is not None and top_k < len(columns):
            outside = np.argsort(-weights, axis=1, kind="stable")[:, top_k:]
            np.put_along_axis(weights, outside, -np.inf, axis=1)
        return weights - logsumexp(weights.T)[:, None]

    return log_prior
