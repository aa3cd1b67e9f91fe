"""Whether a run has what an evaluation needs: experts, the models that they are compared with, and their scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.forest.expert import is_finished
from btm_scale.forest.forest import require_experts
from btm_scale.forest.scores import all_texts, has_scores
from btm_scale.run_dir import DENSE, SEED, RunDir

logger = logging.getLogger(__name__)

_LISTED = 8  # models that a message names


def dense_models(config: RunConfig) -> list[str]:
    """Return the dense baselines of the config."""
    return [*([DENSE] if config.baselines.dense else []), *config.longer_dense_models]


def require_evaluable(config: RunConfig, run: RunDir) -> None:
    """Raise ForestError that names what is missing, unless every model that is compared is trained and scored.

    An expert that the config trains may be missing, because it may have been removed: a warning names it.
    """
    forest = require_experts(run)
    compared = [SEED, *dense_models(config), *config.random_split_models]
    if untrained := [model for model in compared if not is_finished(run.model(model))]:
        raise ForestError(
            f"{_listed(untrained)} of {run.root} {_are(untrained)} not trained. An evaluation compares the experts "
            "with every other model of the config. Complete the run first: btm-scale run CONFIG"
        )
    unscored = [
        model
        for model in [*compared, *forest]
        if not all(has_scores(config, run, model, domain, split) for domain, split in all_texts(config))
    ]
    if unscored:
        raise ForestError(
            f"{_listed(unscored)} of {run.root} {_are(unscored)} not scored on every domain. An evaluation needs all "
            f"scores. Compute them first: btm-scale score {run.root}"
        )
    if absent := [name for name in config.expert_domains if name not in forest]:
        logger.warning("%s %s not trained, and the forest is evaluated without", _listed(absent), _are(absent))


def _listed(models: Sequence[str]) -> str:
    names = list(models[:_LISTED])
    if len(models) > _LISTED:
        names.append(f"{len(models) - _LISTED} more")
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _are(models: Sequence[str]) -> str:
    return "is" if len(models) == 1 else "are"
