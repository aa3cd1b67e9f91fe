"""The stage that makes the mixture of experts of a run: the model that joint training begins with."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch.distributed as dist

from btm_scale.config.moe import mixture_experts
from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.distributed.patience import patient_group
from btm_scale.forest.turns import making_mixture
from btm_scale.run.mixture_recipe import Recipe
from btm_scale.run.upcycle import make_mixture
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.jobs import TrainingJob, mixture_settings

logger = logging.getLogger(__name__)

# What the training of a former mixture left, from which that of another one must not resume. Without its id, a new W&B
# run is started: W&B drops events of steps that the old one already has.
_FORMER_TRAINING = ("checkpoints", "branch.json", "metrics.jsonl", "skipped.json", "wandb-id")


def first_mixture(group: ExpertGroup, config: RunConfig, run: RunDir, job: TrainingJob) -> Path:
    """Return the mixture that its training begins with, which the first rank makes. All ranks call this together.

    It replaces a mixture of other experts or settings, and removes the training of that one. If the config trains the
    mixture for no step, it is the run's mixture itself. Raises ForestError while `upcycle` makes one.
    """
    path = run.mixture_start if job.steps else run.model(MOE)
    if group.is_first and job.layout.tensor > 1:
        logger.info("sequence_parallel is on, because experts need it with tensor=%d", job.layout.tensor)
    merged = patient_group()  # a merge takes longer than a collective of training may wait
    if group.is_first:
        assert config.moe is not None
        recipe = Recipe(
            experts=tuple(mixture_experts(config)),
            top_k=config.moe.top_k,
            router=config.moe.router,
            random_seed=config.random_seed,
        )

        def forget_training() -> None:
            for name in _FORMER_TRAINING:
                old = run.train(MOE) / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

        with making_mixture(run):
            make_mixture(
                config,
                run,
                recipe,
                path,
                settings=mixture_settings(config),
                before=forget_training,
                device=str(group.device),
            )
    dist.barrier(merged)
    return path
