"""Averages of the forest's parameters: uniform, or weighted for a domain by its prior (arXiv 2208.03306, 4.3)."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np

from btm_scale.checkpoint.merge import merge
from btm_scale.checkpoint.safetensors import SafetensorsModel
from btm_scale.config import RunConfig
from btm_scale.forest.expert import Expert, Parent, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.soup import soups
from btm_scale.forest.stack import dev_prior
from btm_scale.run_dir import AVERAGE, RunDir

UNIFORM, ARGMAX, GREEDY = "uniform", "argmax", "greedy"


def average_model(kind: str, domain: str) -> str:
    """The run's name for the average that serves a domain."""
    return f"{AVERAGE}{UNIFORM}" if kind == UNIFORM else f"{AVERAGE}{kind}/{domain}"


def averages_of(config: RunConfig, run: RunDir) -> tuple[str, ...]:
    """The kinds of averages that are made of the forest: none, if its experts are of different shapes."""
    return config.evaluate.averages if len({_shapes(run, name) for name in experts(run)}) <= 1 else ()


def average_texts(config: RunConfig) -> dict[str, list[tuple[str, str]]]:
    """Every average, and the (domain, split) that each is scored on."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for domain in config.all_domains:
        for kind in config.evaluate.averages:
            texts.setdefault(average_model(kind, domain), []).append((domain, config.evaluate.split))
    return texts


def cached_priors(config: RunConfig, run: RunDir) -> dict[str, np.ndarray]:
    """log p(D=j) of every domain's own dev text, nats [experts], experts sorted by name."""
    names = list(experts(run))
    return {domain: dev_prior(run, names, domain) for domain in config.all_domains}


def average_weights(kind: str, log_prior: np.ndarray, soup: np.ndarray | None = None) -> np.ndarray:
    """The experts' weights [experts], which sum to 1; `soup` [experts] tells who is in a greedy average."""
    if soup is not None:
        return soup / soup.sum()
    if kind == UNIFORM:
        return np.full(len(log_prior), 1.0 / len(log_prior))
    if kind == ARGMAX:
        return np.eye(len(log_prior))[int(np.argmax(log_prior))]
    weights = np.exp(log_prior)
    return weights / weights.sum()


def write_averages(config: RunConfig, run: RunDir) -> list[str]:
    """Merge every average that isn't there for the forest and priors as they stand; returns all names."""
    forest = experts(run)
    kinds = averages_of(config, run)
    priors = cached_priors(config, run) if kinds else {}
    members = (soups(config, run) if GREEDY in kinds else None) or {}
    names = []
    for domain, log_prior in priors.items():
        for kind in kinds:
            name = average_model(kind, domain)
            if name not in names:
                names.append(name)
                soup = (
                    np.array([float(name in members[domain]) for name in forest]) if kind == GREEDY else None
                )
                _write_average(run, name, forest, average_weights(kind, log_prior, soup))
    return names


def _write_average(run: RunDir, name: str, forest: dict[str, Expert], weights: np.ndarray) -> None:
    # An expert of no weight takes no part; a weight below what float32 can add to 1 adds nothing either.
    parents = {expert: float(weight) for expert, weight in zip(forest, weights, strict=True) if weight > 1e-9}
    directory = run.model(name)
    card = Expert(
        name=name,
        domains={},
        parents=tuple(Parent(expert, weight) for expert, weight in parents.items()),
        tokens=0,
        steps=0,
        layout={},
        data_fingerprint={expert: forest[expert].content_hash for expert in parents},
        content_hash="",
    )
    if is_finished(directory) and _same_parents(read_expert(directory), card):
        return
    shutil.rmtree(directory, ignore_errors=True)
    report = merge(directory, [(run.model(expert), weight) for expert, weight in parents.items()])
    replace(card, content_hash=report.content_hash).save(directory)


def _shapes(run: RunDir, name: str) -> frozenset[tuple[str, tuple[int, ...]]]:
    with SafetensorsModel(run.model(name)) as model:
        return frozenset((tensor, spec.shape) for tensor, spec in model.specs().items())


def _same_parents(one: Expert, other: Expert) -> bool:
    return one.parents == other.parents and one.data_fingerprint == other.data_fingerprint
