"""Training jobs: the data, steps, parents and part of the schedule of each model of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.config.training import BranchConfig
from btm_scale.errors import ConfigError, unknown_name
from btm_scale.run_dir import DENSE, RANDOM_SPLIT, SEED


@dataclass(frozen=True)
class TrainingJob:
    """The training of one model by one group."""

    model: str
    branch: BranchConfig | None  # None for a model without parents, such as the seed LM
    weights: Mapping[str, float]  # relative weight of each domain, without replayed text
    part: tuple[int, int] | None  # (i, n): train on the i-th of n random parts of the documents only
    steps: int
    sequences: int  # per batch
    batch_share: float  # the batch as a fraction of the budget's batch_tokens
    first_sample: int  # index of the first batch's first sample in the data's fixed order
    samples: int  # length of that order
    progress: tuple[float, float]  # fraction of the schedule before the first step and after the last
    layout: Layout

    def progress_at(self, step: int) -> float:
        """Return the fraction of the schedule that is completed after `step` steps of this job."""
        begin, end = self.progress
        return begin + (end - begin) * step / self.steps

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch of one rank."""
        return self.layout.micro_batches(self.sequences)[0]

    @property
    def accumulation(self) -> int:
        """Micro-batches per step of one rank."""
        return self.layout.micro_batches(self.sequences)[1]


def model_names(config: RunConfig) -> list[str]:
    """Return every model that a run trains, parents before children."""
    names = [SEED]
    if config.baselines.dense:
        names.append(DENSE)
    names += [*config.longer_dense_models, *config.expert_domains]
    return names + config.random_split_models


def training_job(config: RunConfig, model: str) -> TrainingJob:
    """Return the job of one of `model_names`.

    Raises ConfigError for any other name, and for a layout that cannot split the batch.
    """
    budget = config.budget
    batch = budget.sequences
    weights = {name: domain.weight for name, domain in config.domains.items()}
    seed_end = budget.seed_steps / (budget.seed_steps + budget.branch_steps)
    if model in (SEED, DENSE):
        seed_samples = budget.seed_steps * batch
        is_seed = model == SEED
        job = TrainingJob(
            model=model,
            branch=None if is_seed else BranchConfig(),
            weights=weights,
            part=None,
            steps=budget.seed_steps if is_seed else budget.branch_steps,
            sequences=batch,
            batch_share=1.0,
            first_sample=0 if is_seed else seed_samples,
            # Seed and dense share one order of samples, so that dense continues where the seed LM ended.
            samples=seed_samples + budget.branch_steps * batch,
            progress=(0.0, seed_end) if is_seed else (seed_end, 1.0),
            layout=config.shared_layout,
        )
    elif model in config.longer_dense_models:
        # It branches from the seed LM for more steps, with a slower decay and its own order of samples.
        total_steps = budget.seed_steps + budget.branch_steps
        steps = round(total_steps * config.longer_dense_models[model]) - budget.seed_steps
        job = TrainingJob(
            model=model,
            branch=BranchConfig(),
            weights=weights,
            part=None,
            steps=steps,
            sequences=batch,
            batch_share=1.0,
            first_sample=0,
            samples=steps * batch,
            progress=(seed_end, 1.0),
            layout=config.shared_layout,
        )
    else:
        job = _expert_job(config, model, seed_end)
    for problem in job.layout.batch_problems(job.sequences):
        raise ConfigError(f"{model}: {problem}")
    return job


def _expert_job(config: RunConfig, model: str, seed_end: float) -> TrainingJob:
    """Return the job of an expert, or of a model of the random split, which trains like an expert on all domains.

    `seed_end`: fraction of the schedule at which the seed LM ends.
    """
    part = None
    if model in config.random_split_models:
        weights = {name: domain.weight for name, domain in config.domains.items()}
        part = (int(model.removeprefix(RANDOM_SPLIT)), len(config.domains))
    elif model in config.expert_domains:
        weights = {model: 1.0}
    else:
        raise ConfigError(unknown_name("model", model, model_names(config)))
    budget, number = config.budget, len(config.domains)
    batch = budget.batch_tokens // budget.sequence_length
    own = config.experts.get(model)
    branch = config.branch(model)
    # As many steps as dense takes after the seed LM, each with an equal fraction of its batch.
    sequences = config.expert_sequences(model)
    tokens = budget.branch_steps * budget.batch_tokens / number
    if own is not None and own.tokens is not None:
        tokens = own.tokens
    steps = max(1, round(tokens / (sequences * budget.sequence_length)))
    return TrainingJob(
        model=model,
        branch=branch,
        weights=weights,
        part=part,
        steps=steps,
        sequences=sequences,
        batch_share=sequences / batch,
        first_sample=0,
        samples=steps * sequences,
        progress=(seed_end if branch is not None and branch.schedule == "carried" else 0.0, 1.0),
        layout=config.expert_layout(model),
    )


def training_stages(config: RunConfig) -> list[list[str]]:
    """Return the models to train, stage by stage. Models of a stage can train in parallel; the longest come first.

    An expert is in the stage after its last parent; one whose parents are chosen by score, after all earlier experts.
    """
    stage_of = {SEED: 0}
    for model in model_names(config):
        if model == SEED:
            continue
        branch = training_job(config, model).branch
        if branch is None:
            # A model with its own sizes has no parent, but may train beside those that have one.
            stage_of[model] = 1
            continue
        if branch.parents == "seed":
            parents = [SEED]
        elif isinstance(branch.parents, dict):
            parents = list(branch.parents)
        else:
            parents = [SEED, *(name for name in stage_of if name in config.expert_domains)]
        # A parent that this run does not train was added to the forest.
        stage_of[model] = 1 + max(stage_of.get(parent, 0) for parent in parents)
    stages: list[list[str]] = [[] for _ in range(1 + max(stage_of.values()))]
    for model, stage in stage_of.items():
        stages[stage].append(model)

    def work(model: str) -> int:
        job = training_job(config, model)
        return job.steps * job.sequences

    return [sorted(stage, key=work, reverse=True) for stage in stages]
