"""Balanced clustering of texts (c-BTM, arXiv 2303.14177): TF-IDF, SVD and k-means with clusters of equal size.

Prices keep the clusters balanced: each cluster has the price at which exactly its fraction of the text prefers it (the
dual of an optimal transport problem). The same prices apply to text that the clustering has not seen.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from btm_scale.errors import DataError
from btm_scale.util.bounded_json import parse_json, read_bounded

TENSORS, VOCABULARY = "clustering.safetensors", "vocabulary.json"
# Characters of a text that are embedded: more would add little and cost memory.
PLACING_CHARACTERS = 20_000
_TERMS = 50_000
_WORD = r"(?u)\b[^\W\d_]\w+\b"  # TfidfVectorizer's default, without numbers
_ROUNDS = 10
_TOLERANCE = 0.005  # relative error of a cluster's mass
# Softmax temperatures in squared distance: at the last stage, assignments are almost hard.
_SOFTNESS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)

Array = np.ndarray


@dataclass(frozen=True)
class Clustering:
    """Cluster centres, and the embedding that places texts among them."""

    terms: list[str]
    idf: Array  # float32 [terms]
    components: Array  # float32 [dimensions, terms]
    centres: Array  # float32 [clusters, dimensions]
    prices: Array  # float32 [clusters], in squared distance

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        clusters: int,
        *,
        sizes: Sequence[int] | None = None,
        dimensions: int = 100,
        random_seed: int = 0,
    ) -> Clustering:
        """Cluster texts so that the clusters have equal total `sizes` (default: bytes), up to single texts.

        Raises DataError if there is too little text for this many clusters.
        """
        if clusters < 1 or len(texts) < max(2, 4 * clusters):
            raise DataError(
                f"Cannot form {clusters} clusters from {len(texts)} documents. Clustering needs at least 1 cluster and "
                "4 documents for each. Add text, or lower --clusters."
            )
        decomposition = _module("sklearn.decomposition")
        vectorizer = _vectorizer(max_features=_TERMS, min_df=2)
        try:
            weighted = vectorizer.fit_transform(text[:PLACING_CHARACTERS] for text in texts)
        except ValueError as error:
            raise DataError(f"These documents have no words to cluster by ({error}). Add text.") from None
        size = min(dimensions, weighted.shape[1] - 1, len(texts) - 1)
        if size < 1:
            raise DataError("These documents share fewer than two words. Add text.")
        svd = decomposition.TruncatedSVD(size, random_state=random_seed).fit(weighted)
        terms = vectorizer.get_feature_names_out().tolist()
        components = np.ascontiguousarray(svd.components_, dtype=np.float32)
        points = _normalised(weighted @ components.T)
        masses = np.array(sizes or [len(text.encode()) for text in texts], dtype=np.float64)
        centres, prices = balanced_kmeans(points, masses / masses.sum(), clusters, random_seed)
        return cls(terms, vectorizer.idf_.astype(np.float32), components, centres, prices)

    def place(self, texts: Sequence[str]) -> Array:
        """Return the embeddings of texts, unit vectors [texts, dimensions]; zeros for a text with no known word."""
        weighted = self._vectorizer.transform([text[:PLACING_CHARACTERS] for text in texts])
        used = np.unique(weighted.indices)  # few of the terms, if the texts are few
        return _normalised(weighted[:, used] @ self.components[:, used].T)

    @cached_property
    def _vectorizer(self) -> Any:
        vectorizer = _vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        return vectorizer

    def assign(self, texts: Sequence[str]) -> Array:
        """Return the cluster of each text, int64 [texts], at the prices that keep clusters balanced."""
        return np.argmin(squared_distances(self.place(texts), self.centres) - self.prices, axis=1)

    def typical_terms(self, count: int = 8) -> list[list[str]]:
        """Return the most typical words of each cluster, relative to the mean of all clusters."""
        directions = (self.centres - self.centres.mean(axis=0)) @ self.components
        return [[self.terms[place] for place in np.argsort(-row, kind="stable")[:count]] for row in directions]

    def save(self, directory: Path) -> None:
        """Write the clustering's two files."""
        (directory / VOCABULARY).write_text(json.dumps(self.terms, ensure_ascii=False), encoding="utf-8")
        tensors = {
            "idf": self.idf,
            "components": self.components,
            "centres": self.centres,
            "prices": self.prices,
        }
        (directory / TENSORS).write_bytes(save(tensors))  # save_file creates files with mode 0600; a run may be shared

    @classmethod
    def load(cls, directory: Path) -> Clustering:
        """Load a clustering. Raises DataError if it is missing or damaged."""
        try:
            terms = parse_json(read_bounded(directory / VOCABULARY))
            clustering = cls(terms, **load_file(directory / TENSORS))
            clustering._require_sizes()
            return clustering
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise DataError(
                f"There is no clustering in {directory} ({error}). Create one: btm-scale discover PATHS --out "
                f"{directory}"
            ) from None

    def _require_sizes(self) -> None:
        """Raise ValueError for tensors that do not fit each other."""
        if not isinstance(self.terms, list) or not all(isinstance(term, str) for term in self.terms):
            raise ValueError(f"{VOCABULARY} must be a list of words")
        terms, clusters = len(set(self.terms)), len(self.centres) if self.centres.ndim else 0
        dimensions = len(self.components) if self.components.ndim else 0
        expected = {"idf": (terms,), "components": (dimensions, terms), "prices": (clusters,)}
        for name, shape in (expected | {"centres": (clusters, dimensions)}).items():
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != np.float32 or 0 in shape or not np.isfinite(tensor).all():
                raise ValueError(f"{TENSORS}: {name} must be float32 of shape {list(shape)} and finite")


def balanced_kmeans(points: Array, masses: Array, clusters: int, random_seed: int) -> tuple[Array, Array]:
    """Return centres [clusters, dimensions] and prices [clusters] at which all clusters attract equal mass.

    Args: `points` [texts, dimensions]; `masses` [texts], which sum to 1.
    """
    kmeans = _module("sklearn.cluster").KMeans(clusters, n_init=3, random_state=random_seed).fit(points, None, masses)
    centres = kmeans.cluster_centers_.astype(np.float32)
    prices = _fair_prices(squared_distances(points, centres), masses, np.zeros(clusters), _SOFTNESS)
    for _ in range(_ROUNDS):
        costs = squared_distances(points, centres)
        prices = _fair_prices(costs, masses, prices, _SOFTNESS[-2:])
        chosen = np.argmin(costs - prices, axis=1)
        shares = np.zeros((clusters, len(points)))
        shares[chosen, np.arange(len(points))] = masses
        total = shares.sum(axis=1, keepdims=True)
        moved = np.where(total > 0, shares @ points / np.where(total > 0, total, 1.0), centres).astype(np.float32)
        if np.allclose(moved, centres, atol=1e-4):
            break
        centres = moved
    prices = _fair_prices(squared_distances(points, centres), masses, prices, _SOFTNESS[-2:])
    return centres, prices.astype(np.float32)


def squared_distances(points: Array, centres: Array) -> Array:
    """Return the squared Euclidean distances [points, centres]."""
    product = points @ centres.T
    squared: Array = (points**2).sum(axis=1)[:, None] - 2 * product + (centres**2).sum(axis=1)
    return np.maximum(squared, 0.0)


def _fair_prices(costs: Array, masses: Array, prices: Array, stages: Sequence[float]) -> Array:
    """Return the prices [clusters] at which all clusters attract equal mass.

    They minimise the smoothed dual of the optimal transport of the texts' masses to the clusters: texts choose by a
    softmax whose temperature decreases over `stages`. `prices` is the initial value.
    """
    clusters = costs.shape[1]
    minimize = _module("scipy.optimize").minimize

    def dual(prices: Array, softness: float) -> tuple[float, Array]:
        attraction = (prices - costs) / softness
        peak = attraction.max(axis=1, keepdims=True)
        shares = np.exp(attraction - peak)
        total = shares.sum(axis=1, keepdims=True)
        value = softness * float(masses @ (peak + np.log(total))[:, 0]) - prices.mean()
        return value, masses @ (shares / total) - 1.0 / clusters

    for softness in stages:
        options = {"gtol": _TOLERANCE / clusters, "ftol": 1e-15, "maxiter": 500}
        prices = minimize(dual, prices, (softness,), "L-BFGS-B", jac=True, options=options).x
        prices -= prices.mean()
    return prices


def _normalised(points: Any) -> Array:
    points = np.asarray(points, dtype=np.float32)
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(norms > 0, norms, 1.0)


def _vectorizer(**settings: Any) -> Any:
    text = _module("sklearn.feature_extraction.text")
    return text.TfidfVectorizer(
        stop_words="english", token_pattern=_WORD, sublinear_tf=True, dtype=np.float32, **settings
    )


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(
            "Discovering domains needs scikit-learn, which is not installed. Run: pip install 'btm-scale[discover]'"
        ) from None
