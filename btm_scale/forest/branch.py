"""Branching: which models a new expert begins with, and with how much of each (arXiv 2208.03306, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from btm_scale.config.run import BranchConfig
from btm_scale.errors import ForestError
from btm_scale.forest.expert import Parent, is_finished
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import dev_prior
from btm_scale.run_dir import SEED, RunDir

# A parent of less weight than this is left out: it would cost a model's reading and move nothing.
_LEAST_WEIGHT = 1e-3


def parents_of(run: RunDir, name: str, branch: BranchConfig) -> tuple[Parent, ...]:
    """The models that an expert for domain `name` begins with; their weights sum to 1.

    `nearest` and `posterior` go by the scores of the forest's experts on the domain's dev text. Raises ForestError
    if a named parent is no finished model of this run, or those scores are missing.
    """
    if branch.parents == "seed":
        return (Parent(SEED, 1.0),)
    if isinstance(branch.parents, dict):
        return _named(run, name, branch.parents)
    candidates = [expert for expert in experts(run) if expert != name]
    if not candidates:
        raise ForestError(f"{name} branches from the {branch.parents} expert, and {run.experts} holds none yet")
    weights = np.exp(dev_prior(run, candidates, name))
    if branch.parents == "nearest":
        return (Parent(candidates[int(np.argmax(weights))], 1.0),)
    kept = {
        expert: float(weight) for expert, weight in zip(candidates, weights, strict=True) if weight >= _LEAST_WEIGHT
    }
    return _normalised(kept)


def _named(run: RunDir, name: str, parents: Mapping[str, float]) -> tuple[Parent, ...]:
    for parent in parents:
        if not is_finished(run.model(parent)):
            known = ", ".join([SEED, *experts(run)])
            raise ForestError(
                f"{name} branches from '{parent}', which is no finished model of {run.root}; it has {known}"
            )
    return _normalised(parents)


def _normalised(weights: Mapping[str, float]) -> tuple[Parent, ...]:
    total = sum(weights.values())
    return tuple(Parent(parent, weight / total) for parent, weight in weights.items() if weight > 0)
