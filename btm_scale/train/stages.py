"""The models of a run in the order in which they can be trained."""

from __future__ import annotations

from btm_scale.config.run import RunConfig
from btm_scale.run_dir import SEED
from btm_scale.train.job import model_names, training_job


def training_stages(config: RunConfig) -> list[list[str]]:
    """The models to train, those that may run side by side together; in a stage, the longest first.

    An expert stands in the stage after the last of its parents; one that chooses its parents, after all before it.
    """
    stage_of = {SEED: 0}
    for model in model_names(config):
        if model == SEED:
            continue
        branch = training_job(config, model).branch
        if branch is None:
            # Of a size of its own: it needs no parent, but may run beside those that do.
            stage_of[model] = 1
            continue
        if branch.parents == "seed":
            parents = [SEED]
        elif isinstance(branch.parents, dict):
            parents = list(branch.parents)
        else:
            parents = [SEED, *(name for name in stage_of if name in config.expert_domains)]
        # A parent that this run doesn't train was added to the forest as it is.
        stage_of[model] = 1 + max(stage_of.get(parent, 0) for parent in parents)
    stages: list[list[str]] = [[] for _ in range(1 + max(stage_of.values()))]
    for model, stage in stage_of.items():
        stages[stage].append(model)

    def work(model: str) -> int:
        job = training_job(config, model)
        return job.steps * job.sequences

    return [sorted(stage, key=work, reverse=True) for stage in stages]
