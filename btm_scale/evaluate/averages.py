"""Averages of the forest's parameters: uniform, or for a domain by its prior (arXiv 2208.03306, 4.3), or otherwise."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence

import numpy as np

from btm_scale.checkpoint.merge.merge import merge_many
from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.evaluate.soups import soups
from btm_scale.forest.expert import CARD, Expert, Parent, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.methods import ARGMAX, GREEDY, POSTERIOR, TEMPERED, UNIFORM, _merged, average_texts, averages_of
from btm_scale.forest.posterior.mixture import mean_tempered_weights
from btm_scale.forest.posterior.prior import cached_prior
from btm_scale.forest.priors import tempering_of
from btm_scale.forest.scores import Stack, missing_scores
from btm_scale.run_dir import RunDir
from btm_scale.util.pools import in_processes


def average_weights(
    config: RunConfig, run: RunDir, names: Sequence[str], kinds: Sequence[str], domain: str
) -> dict[str, np.ndarray]:
    """For each kind of average of a domain the experts' weights [experts], which sum to 1.

    Of kind greedy they are those of the members that were chosen. Raises ForestError for missing scores.
    """
    dev = Stack.load(run, names, domain, "dev")
    prior = cached_prior(dev.log_probs, dev.block_starts)
    weights = {UNIFORM: np.full(len(names), 1.0 / len(names)), POSTERIOR: np.exp(prior) / np.exp(prior).sum()}
    if TEMPERED in kinds:
        tempering = tempering_of(config.evaluate, lambda: dev, prior)
        weights[TEMPERED] = mean_tempered_weights(dev.log_probs, dev.block_starts, tempering, log_prior=prior)
    if GREEDY in kinds and (members := soups(config, run)) is not None:
        chosen = np.array([float(name in members[domain]) for name in names])
        weights[GREEDY] = chosen / chosen.sum()
    return {kind: weights[kind] for kind in kinds}


def are_finished(config: RunConfig, run: RunDir) -> bool:
    """Whether every average is there, with its scores, for the forest and priors as they stand."""
    cards = _planned(config, run)
    if cards is None:
        return False
    texts = average_texts(config)
    return all(
        _is_made(run, card) and not missing_scores(config, run, name, texts[name]) for name, card in cards.items()
    )


def planned_averages(config: RunConfig, run: RunDir) -> list[Expert]:
    """The card, without its hash, of every average for the forest and priors as they stand.

    Raises ForestError while the members of a greedy one are not chosen.
    """
    cards = _planned(config, run)
    if cards is None:
        raise ForestError(f"the members of the greedy averages are not chosen: evaluate the run in {run.root}")
    return list(cards.values())


def write_averages(run: RunDir, cards: Sequence[Expert]) -> list[str]:
    """Merge those of the planned averages that aren't there; returns their names."""
    missing = {run.model(card.name): card for card in cards if not _is_made(run, card)}
    for directory in missing:
        shutil.rmtree(directory, ignore_errors=True)
    parents = {
        directory: [(run.model(parent.name), parent.weight) for parent in card.parents]
        for directory, card in missing.items()
    }
    for report in merge_many(parents):
        card = missing[report.output].model_copy(update={"content_hash": report.content_hash})
        card.save(report.output / CARD)
    return [card.name for card in missing.values()]


def _planned(config: RunConfig, run: RunDir) -> dict[str, Expert] | None:
    """Every average's card, without its hash; None while a greedy one's members are not chosen."""
    forest = experts(run)
    kinds = [kind for kind in averages_of(config, run) if kind != ARGMAX]
    if not kinds:
        return {}
    if GREEDY in kinds and soups(config, run) is None:
        return None
    domains = list(config.all_domains)
    weigh = functools.partial(average_weights, config, run, list(forest), kinds)
    cards: dict[str, Expert] = {}
    for domain, weights in zip(domains, in_processes(weigh, domains), strict=True):
        for kind in kinds:
            name = _merged(kind, domain)
            if name not in cards:
                cards[name] = _card(name, forest, weights[kind])
    return cards


def _card(name: str, forest: dict[str, Expert], weights: np.ndarray) -> Expert:
    # An expert of no weight takes no part; a weight below what float32 can add to 1 adds nothing either.
    parents = {expert: float(weight) for expert, weight in zip(forest, weights, strict=True) if weight > 1e-9}
    return Expert(
        name=name,
        domains={},
        parents=tuple(Parent(expert, weight) for expert, weight in parents.items()),
        tokens=0,
        steps=0,
        layout={},
        data_fingerprint={expert: forest[expert].content_hash for expert in parents},
        content_hash="",
    )


def _is_made(run: RunDir, card: Expert) -> bool:
    """Whether the average is there, of the same parents with the same weights."""
    directory = run.model(card.name)
    if not is_finished(directory):
        return False
    found = read_expert(directory)
    return found.parents == card.parents and found.data_fingerprint == card.data_fingerprint
