from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.handmade_run import DOMAINS
from helpers.tiny_forest import LETTERS, Letters, write_experts

from btm_scale.config.run import RunConfig
from btm_scale.data import clustering as data_clustering
from btm_scale.data.clustering import Clustering, squared_distances
from btm_scale.errors import DataError, ForestError
from btm_scale.evaluate.ensemble import routed_methods
from btm_scale.forest.posterior.routing import log_weights, routed_mixture_log_probs, router
from btm_scale.forest.scores import Stack, evaluation_text
from btm_scale.generate.generator import Generator
from btm_scale.run_dir import RunDir

WORDS = ["", "def return", "licence software", "import yield", "warranty provided"]


@pytest.fixture(scope="module")
def clustering() -> Clustering:
    texts = ["def return import yield class " * n for n in range(1, 9)]
    texts += ["licence software warranty provided copyright " * n for n in range(1, 9)]
    return Clustering.fit(texts, 2, sizes=[1] * len(texts), dimensions=4)


def as_words(ids: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in ids)


class Words(Letters):
    def decode(self, ids: Sequence[int]) -> str:
        return as_words(ids)


def test_clusters_are_weighted_by_their_distance_to_the_text(clustering: Clustering) -> None:
    texts = ["def return import", "licence warranty", "class licence", ""]
    distances = squared_distances(clustering.place(texts), clustering.centres)
    expected = np.exp(-distances / 0.1)
    weights = np.exp(log_weights(clustering, texts))
    assert weights == pytest.approx(expected / expected.sum(axis=1, keepdims=True), rel=1e-4)
    nearest = log_weights(clustering, texts, top_k=1)
    assert (np.isfinite(nearest).sum(axis=1) == 1).all()
    assert (nearest.argmax(axis=1) == distances.argmin(axis=1)).all()


def test_scores_are_mixed_by_the_distance_of_the_text_so_far(clustering: Clustering) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(1, len(LETTERS), 24)
    log_probs = -random.exponential(2.0, (2, 23))
    starts = np.array([0, 13])
    settings: dict[str, Any] = {"top_k": 1, "every": 3}
    for given in ({}, settings):
        mixed = routed_mixture_log_probs(log_probs, tokens, starts, clustering, as_words, **given)
        every = given.get("every", 32)
        for target in range(23):
            begin = 13 if target >= 13 else 0
            seen = tokens[begin : begin + (target - begin) // every * every + 1]
            weights = np.exp(log_weights(clustering, [as_words(seen)], top_k=given.get("top_k"))[0])
            assert mixed[target] == pytest.approx(np.log(weights @ np.exp(log_probs[:, target])), abs=1e-5)
    with pytest.raises(ForestError, match="Cannot route 3 experts by 2 clusters"):
        routed_mixture_log_probs(np.zeros((3, 23)), tokens, starts, clustering, as_words)


def test_a_prompt_is_completed_by_the_expert_that_it_is_routed_to(clustering: Clustering, tmp_path: Path) -> None:
    models = dict(zip(("cluster0", "cluster1"), write_experts(tmp_path).values(), strict=True))
    code, licence = log_weights(clustering, ["def return import", "licence warranty"]).argmax(axis=1).tolist()
    assert {code, licence} == {0, 1}
    generator = Generator(
        models,
        Words(),
        router=router(clustering, list(models), top_k=1),
        method="per-token",
        posterior="fixed",
    )
    completions = generator.generate(["aca", "bdb"], max_tokens=3)
    assert [max(completion.posterior, key=completion.posterior.__getitem__) for completion in completions] == [
        f"cluster{code}",
        f"cluster{licence}",
    ]
    assert all(max(completion.posterior.values()) == 1.0 for completion in completions)
    with pytest.raises(ForestError, match="'law' is not one of the clustering's 2 clusters"):
        router(clustering, ["cluster0", "law"])


def test_a_prior_by_distance_builds_its_vectorizer_once(
    clustering: Clustering, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["def return import", "licence warranty", ""]
    expected = log_weights(clustering, texts)
    build, builds = data_clustering._vectorizer, list[int]()
    monkeypatch.setattr(data_clustering, "_vectorizer", lambda **given: builds.append(1) or build(**given))
    prior = router(dataclasses.replace(clustering), ["cluster0", "cluster1"])
    assert builds == [1], "at the start"
    assert prior(texts) == pytest.approx(expected, abs=1e-6)
    assert prior(texts[::-1]) == pytest.approx(expected[::-1], abs=1e-6)
    assert builds == [1]


def test_a_prior_by_distance_without_scikit_learn_is_refused_before_the_first_text(
    clustering: Clustering, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = dataclasses.replace(clustering)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DataError, match=r"pip install 'btm-scale\[discover\]'"):
        router(fresh, ["cluster0", "cluster1"])


def test_a_run_on_discovered_domains_has_routed_methods(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    config, run = handmade
    forest = Stack.load(run, ["python", "cpp", "licences", "docs"], "python", "dev")
    text = evaluation_text(config, run, "python", "dev")
    clusters = ["cluster0", "cluster1", "cluster2", "cluster3"]
    assert routed_methods(config, run, clusters, forest, text) == {}
    texts = [json.loads(line)["text"] for name in DOMAINS for line in (config.text_root / f"{name}.jsonl").open()]
    Clustering.fit(texts[::2], 4, dimensions=8).save(tmp_path)
    moved = config.model_copy(update={"text_root": tmp_path})
    assert routed_methods(moved, run, ["python", *clusters[1:]], forest, text) == {}
    methods = routed_methods(moved, run, clusters, forest, text)
    assert set(methods) == {"ensemble:routed", "ensemble:routed:top1", "ensemble:routed:top2"}
    # Rows follow the names when the experts are in another order.
    reordered = Stack(forest.log_probs[::-1], forest.block_starts)
    again = routed_methods(moved, run, clusters[::-1], reordered, text)
    for method, log_probs in methods.items():
        assert np.array_equal(log_probs, again[method])
        assert (log_probs <= forest.log_probs.max(axis=0) + 1e-6).all()
        assert (log_probs >= forest.log_probs.min(axis=0) - 1e-6).all()
