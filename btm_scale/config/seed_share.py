"""What else of a config must fit `budget.seed_share`, whose ends leave the seed LM or its branches without a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from btm_scale.run_dir import SEED

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig


def seed_share_problems(config: RunConfig) -> Iterator[str]:
    """Yield why other sections do not fit the seed share, a message for each problem."""
    yield from _decay_problems(config)
    if config.budget.seed_share == 0 and config.model.pretrained is None:
        yield from _frozen_at_random(config)
    if config.budget.seed_share == 1:
        yield from _after_the_schedule(config)


def share_note(config: RunConfig) -> str:
    """Return what a seed share at one of its ends means for the models; "" for any other."""
    if config.budget.seed_share == 0 and config.model.pretrained is None:
        return "budget.seed_share is 0: the seed LM is a random initialization, which the experts and dense train from"
    if config.budget.branch_steps == 0:
        return "budget.seed_share is 1: the seed LM takes every step, and dense and experts are copies of it"
    return ""


def _decay_problems(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    seed_share = config.budget.seed_steps / config.budget.schedule_steps[0]
    if optimizer.decay != "wsd" or seed_share <= optimizer.stable_share:
        return
    largest = math.floor(100 * (1 - seed_share)) / 100
    remedy = f"use {largest} or less" if largest else "lower budget.seed_share, or use another optimizer.decay"
    yield (
        f"optimizer.decay_share {optimizer.decay_share} begins before the seed LM ends, at {seed_share:.2f} of the "
        f"schedule. Only branches decay: {remedy}."
    )


def _frozen_at_random(config: RunConfig) -> Iterator[str]:
    """Yield the experts that would keep tensors of a seed LM that no token has trained."""
    for name, expert in config.experts.items():
        parents = expert.branch.parents
        branches_from_seed = parents == SEED or (isinstance(parents, dict) and parents.get(SEED, 0.0) > 0)
        if expert.train != "all" and expert.model is None and branches_from_seed:
            yield (
                f"experts.{name}: has train: {expert.train}, and budget.seed_share 0 leaves the seed LM at its random "
                "initialization, so that the frozen tensors would never be trained. Raise budget.seed_share, set "
                "model.pretrained, or remove train."
            )


def _after_the_schedule(config: RunConfig) -> Iterator[str]:
    """Yield the models whose steps would follow the end of the schedule, which the seed LM completes."""
    if config.baselines.dense_compute:
        yield (
            "baselines.dense_compute: budget.seed_share 1 completes the schedule with the seed LM, which longer "
            "baselines continue. Lower seed_share, or remove dense_compute."
        )
    for name, expert in config.experts.items():
        if expert.tokens is not None and expert.model is None and expert.branch.schedule == "carried":
            yield (
                f"experts.{name}.tokens: budget.seed_share 1 completes the schedule with the seed LM, which the expert "
                f"continues. Set experts.{name}.branch.schedule to restarted, or remove tokens."
            )
