"""What it takes to train one model of a run: its data, its steps, its parent, its part of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.config.training import BranchConfig
from btm_scale.errors import ConfigError
from btm_scale.run_dir import DENSE, RANDOM_SPLIT, SEED


@dataclass(frozen=True)
class TrainingJob:
    """One model's training, by one group."""

    model: str
    branch: BranchConfig | None  # what it begins with; the seed LM begins with nothing
    weights: Mapping[str, float]  # each domain's share of the data, replayed text not counted
    part: tuple[int, int] | None  # (i, n): train on the i-th of n random parts of the documents only
    steps: int
    sequences: int  # in a batch
    batch_share: float  # the batch, as a share of the budget's batch_tokens
    first_sample: int  # where in the data's fixed order the first batch begins
    samples: int  # length of that order
    progress: tuple[float, float]  # of the schedule, before the first step and after the last
    layout: Layout

    def progress_at(self, step: int) -> float:
        """Share of the schedule that is done after `step` steps of this job."""
        begin, end = self.progress
        return begin + (end - begin) * step / self.steps

    @property
    def micro_batch(self) -> int:
        """Sequences that one rank takes at once."""
        return self.layout.micro_batches(self.sequences)[0]

    @property
    def accumulation(self) -> int:
        """Micro-batches that one rank takes in a step."""
        return self.layout.micro_batches(self.sequences)[1]


def model_names(config: RunConfig) -> list[str]:
    """Every model that a run trains, parents before children."""
    names = [SEED]
    if config.baselines.dense:
        names.append(DENSE)
    names += [*config.longer_dense_models, *config.expert_domains]
    return names + config.random_split_models


def training_job(config: RunConfig, model: str) -> TrainingJob:
    """The job of one of `model_names`. Raises ConfigError for any other name, or a layout that can't take the batch."""
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
            # Seed and dense read one order, so that dense is the model that the seed would have become.
            samples=seed_samples + budget.branch_steps * batch,
            progress=(0.0, seed_end) if is_seed else (seed_end, 1.0),
            layout=config.shared_layout,
        )
    elif model in config.longer_dense_models:
        # It leaves the seed for a longer way, along which its rate falls more slowly, in an order of its own.
        whole = budget.seed_steps + budget.branch_steps
        steps = round(whole * config.longer_dense_models[model]) - budget.seed_steps
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
    """The job of an expert, or of one of the random split's models, which train as experts of all domains do.

    `seed_end`: where in the schedule, from 0 to 1, the seed LM ends.
    """
    part = None
    if model in config.random_split_models:
        weights = {name: domain.weight for name, domain in config.domains.items()}
        part = (int(model.removeprefix(RANDOM_SPLIT)), len(config.domains))
    elif model in config.expert_domains:
        weights = {model: 1.0}
    else:
        raise ConfigError(f"no model is called '{model}'; this run trains {', '.join(model_names(config))}")
    budget, number = config.budget, len(config.domains)
    batch = budget.batch_tokens // budget.sequence_length
    own = config.experts.get(model)
    branch = config.branch(model)
    # As many steps as dense takes after the seed, with an equal share of its batch.
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
