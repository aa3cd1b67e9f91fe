"""Texts as points, and points as clusters of equal size (c-BTM, arXiv 2303.14177): TF-IDF, SVD, balanced k-means.

Balance is a matter of prices: each cluster asks the price at which exactly its share of the text prefers it (the dual
of an optimal transport). The same prices go on serving for text that the clustering has never seen.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from btm_scale.errors import DataError

TENSORS, VOCABULARY = "clustering.safetensors", "vocabulary.json"
# Characters of a text that place it: more would tell little, and cost memory.
PLACING_CHARACTERS = 20_000
_TERMS = 50_000
_WORD = r"(?u)\b[^\W\d_]\w+\b"  # as TfidfVectorizer's own, but no numbers
_ROUNDS = 10
_TOLERANCE = 0.005  # of a cluster's share
# In squared distance: at the last stage a text belongs to one cluster nearly wholly.
_SOFTNESS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)

Array = np.ndarray


@dataclass(frozen=True)
class Clustering:
    """Where clusters lie, and how texts are placed beside them."""

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
        """Cluster texts so that each cluster holds the same share of their sizes (default: bytes), up to single texts.

        Raises DataError if there is too little text for so many clusters.
        """
        if clusters < 1 or len(texts) < max(2, 4 * clusters):
            raise DataError(
                f"{len(texts)} documents cannot make {clusters} clusters; it takes at least 1 cluster, and 4 documents "
                "for each: give more text, or ask for fewer"
            )
        decomposition = _module("sklearn.decomposition")
        vectorizer = _vectorizer(max_features=_TERMS, min_df=2)
        try:
            weighted = vectorizer.fit_transform(text[:PLACING_CHARACTERS] for text in texts)
        except ValueError as error:
            raise DataError(f"these documents have no words to tell them apart by ({error}); give more text") from None
        size = min(dimensions, weighted.shape[1] - 1, len(texts) - 1)
        if size < 1:
            raise DataError("these documents share no two words; give more text")
        svd = decomposition.TruncatedSVD(size, random_state=random_seed).fit(weighted)
        terms = vectorizer.get_feature_names_out().tolist()
        components = np.ascontiguousarray(svd.components_, dtype=np.float32)
        points = _normalised(weighted @ components.T)
        masses = np.array(sizes or [len(text.encode()) for text in texts], dtype=np.float64)
        centres, prices = balanced_kmeans(points, masses / masses.sum(), clusters, random_seed)
        return cls(terms, vectorizer.idf_.astype(np.float32), components, centres, prices)

    def place(self, texts: Sequence[str]) -> Array:
        """Unit vectors [texts, dimensions]; zeros for a text with no known word."""
        vectorizer = _vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        weighted = vectorizer.transform([text[:PLACING_CHARACTERS] for text in texts])
        return _normalised(weighted @ self.components.T)

    def assign(self, texts: Sequence[str]) -> Array:
        """The cluster of each text, int64 [texts], at prices that keep clusters balanced."""
        return np.argmin(squared_distances(self.place(texts), self.centres) - self.prices, axis=1)

    def typical_terms(self, count: int = 8) -> list[list[str]]:
        """The words that stand out in each cluster, compared with the mean of all."""
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
        (directory / TENSORS).write_bytes(save(tensors))  # save_file would let nobody else read it

    @classmethod
    def load(cls, directory: Path) -> Clustering:
        """Read a clustering. Raises DataError if there is none."""
        try:
            terms = json.loads((directory / VOCABULARY).read_text(encoding="utf-8"))
            return cls(terms, **load_file(directory / TENSORS))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"no clustering in {directory} ({error}); make one: btm-scale discover PATHS --out {directory}"
            ) from None


def balanced_kmeans(points: Array, masses: Array, clusters: int, random_seed: int) -> tuple[Array, Array]:
    """Centres [clusters, dimensions] and prices [clusters] at which every cluster attracts an equal mass.

    `points` [texts, dimensions]; `masses` [texts], which sum to 1.
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
    """[points, centres]."""
    product = points @ centres.T
    squared: Array = (points**2).sum(axis=1)[:, None] - 2 * product + (centres**2).sum(axis=1)
    return np.maximum(squared, 0.0)


def _fair_prices(costs: Array, masses: Array, prices: Array, stages: Sequence[float]) -> Array:
    """What each cluster [clusters] adds to its attraction so that all attract equal mass.

    They minimise the dual of the transport of the texts' masses to the clusters at the least cost, made smooth: texts
    choose by softmax, whose softness goes down in `stages`. `prices` is where to start.
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
            "finding domains needs scikit-learn, which is not installed: pip install 'btm-scale[discover]'"
        ) from None
