"""Averages of the experts' parameters: find the missing ones and merge them (arXiv 2208.03306, section 4.3)."""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge_many
from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import ForestError
from btm_scale.evaluate.average_weights import average_weights
from btm_scale.evaluate.soups import choose_soups, soups
from btm_scale.forest.average_models import average_texts, averages_of, made_averages_of, made_model
from btm_scale.forest.expert import CARD, Expert, Parent, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.methods import GREEDY
from btm_scale.forest.scores import missing_scores
from btm_scale.run_dir import RunDir
from btm_scale.util.pools import in_processes

logger = logging.getLogger(__name__)


def are_finished(config: RunConfig, run: RunDir) -> bool:
    """Return whether every average of the current forest and priors exists and is scored."""
    cards = _planned(config, run)
    if cards is None:
        return False
    texts = average_texts(config)
    return all(
        _is_merged(run, card) and not missing_scores(config, run, name, texts[name]) for name, card in cards.items()
    )


def planned_averages(config: RunConfig, run: RunDir) -> list[Expert]:
    """Return the card, without its hash, of every average of the current forest and priors.

    Raises ForestError before the members of greedy averages are chosen.
    """
    cards = _planned(config, run)
    if cards is None:
        raise ForestError(
            f"The members of the greedy averages are not chosen yet. Choose them first: btm-scale evaluate {run.root}"
        )
    return list(cards.values())


def write_averages(run: RunDir, cards: Sequence[Expert]) -> list[str]:
    """Merge the planned averages that do not exist yet; returns their names."""
    missing = {run.model(card.name): card for card in cards if not _is_merged(run, card)}
    for directory in missing:
        shutil.rmtree(directory, ignore_errors=True)
    parents = {
        directory: [(run.model(parent.name), parent.weight) for parent in card.parents]
        for directory, card in missing.items()
    }
    # Experts trained in different precisions are averaged in the wider one, whichever averages are missing.
    dtype = promoted_dtype({run.model(parent.name) for card in cards for parent in card.parents}) if missing else None
    for report in merge_many(parents, dtype=dtype):
        card = missing[report.output].model_copy(update={"content_hash": report.content_hash})
        card.save(report.output / CARD)
    return [card.name for card in missing.values()]


def make_averages(group: ExpertGroup, config: RunConfig, run: RunDir) -> list[str]:
    """Merge the missing averages; returns the names of all averages on every rank. All ranks call this together."""
    # Merging large models and computing many weights take longer than the timeout of training's collectives.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if group.decided(lambda: GREEDY in averages_of(config, run) and soups(config, run) is None):
        choose_soups(group, config, run)
    cards = [planned_averages(config, run) if group.is_first else []]
    dist.broadcast_object_list(cards, src=0, group=patient)
    if group.is_first:
        begin = time.perf_counter()
        merged = write_averages(run, cards[0])
        logger.info("merged in %.3f s: %s", time.perf_counter() - begin, ", ".join(merged) or "nothing is missing")
    dist.barrier(patient)
    return [card.name for card in cards[0]]


def _planned(config: RunConfig, run: RunDir) -> dict[str, Expert] | None:
    """Return every average's card, without its hash; None before the members of greedy averages are chosen."""
    forest = experts(run)
    kinds = made_averages_of(config, run)
    if not kinds:
        return {}
    if GREEDY in kinds and soups(config, run) is None:
        return None
    domains = list(config.all_domains)
    weights_of = functools.partial(average_weights, config, run, list(forest), kinds)
    cards: dict[str, Expert] = {}
    for domain, weights in zip(domains, in_processes(weights_of, domains), strict=True):
        for kind in kinds:
            name = made_model(kind, domain)
            if name not in cards:
                cards[name] = _card(name, forest, weights[kind])
    return cards


def _card(name: str, forest: dict[str, Expert], weights: np.ndarray) -> Expert:
    # Weights that vanish beside 1 in float32 are dropped.
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


def _is_merged(run: RunDir, card: Expert) -> bool:
    """Return whether the average exists, from the same parents with the same weights."""
    directory = run.model(card.name)
    if not is_finished(directory):
        return False
    existing = read_expert(directory)
    return existing.parents == card.parents and existing.data_fingerprint == card.data_fingerprint
