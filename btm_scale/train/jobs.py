"""Training jobs: the data, steps, parents and part of the schedule of each model of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from btm_scale.config.layout import Layout
from btm_scale.config.moe import (
    MoeConfig,
    MoeTrainConfig,
    mixture_experts,
    mixture_layout,
    mixture_sequences,
    mixture_shape,
)
from btm_scale.config.run import RunConfig
from btm_scale.config.training import BranchConfig, OptimizerConfig
from btm_scale.errors import ConfigError, unknown_name
from btm_scale.forest.expert import find_expert, is_finished, read_expert
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import TrainedPart
from btm_scale.run_dir import DENSE, MOE, RANDOM_SPLIT, SEED, RunDir

_ROUNDING = 1e-6  # of a step


@dataclass(frozen=True)
class Stretch:
    """The steps of a job up to the end of one budget. A budget that is raised adds a stretch."""

    steps: int  # of the job at its end
    samples: int  # length of the data's fixed order
    progress: tuple[float, float]  # fraction of the schedule before the job's first step and after this stretch
    warmup_scale: float = 1.0  # see OptimizerConfig.rate


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
    warmup_scale: float = 1.0
    earlier: tuple[Stretch, ...] = ()  # of smaller budgets; steps, samples and progress are those of the last
    # With wsd: the steps that a raised budget keeps, since neither rate nor text depends on it.
    stable_steps: int | None = None
    trains: TrainedPart = "all"
    mixture: MoeTrainConfig | None = None  # settings of joint training, for the mixture of experts

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The stretches of all budgets, the last one included."""
        return (*self.earlier, Stretch(self.steps, self.samples, self.progress, self.warmup_scale))

    def progress_at(self, step: int) -> float:
        """Return the fraction of the schedule that is completed after `step` steps of this job."""
        stretch = self._stretch_of(step)
        begin, end = stretch.progress
        return begin + (end - begin) * step / stretch.steps

    def rate_at(self, step: int, optimizer: OptimizerConfig) -> float:
        """Return the learning rate of a step."""
        return optimizer.rate(self.progress_at(step), self._stretch_of(step).warmup_scale)

    def decay_after(self, step: int) -> int | None:
        """Return the step at which the decay ends that this many steps are part of; None outside of a decay.

        Only the job of the same length can resume from there.
        """
        return self.steps if self.stable_steps is not None and step > self.stable_steps else None

    def _stretch_of(self, step: int) -> Stretch:
        return next((one for one in self.stretches if step <= one.steps), self.stretches[-1])

    @property
    def router_rate(self) -> float:
        """The learning rate of routers as a multiple of the step's."""
        return 1.0 if self.mixture is None else self.mixture.router_lr_scale / self.mixture.lr_scale

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
    return names + config.random_split_models + ([MOE] if config.moe is not None else [])


def shape_of(config: RunConfig, model: str, vocabulary: int) -> ModelShape:
    """Return the shape of one of `model_names`."""
    if model == MOE:
        return mixture_shape(config, vocabulary)
    return config.expert_model(model).shape(vocabulary, config.budget.sequence_length)


def optimizer_of(config: RunConfig, model: str) -> OptimizerConfig:
    """Return the optimizer and schedule of a model. The mixture has its own warmup, and decays linearly to 0."""
    if model != MOE or config.moe is None:
        return config.optimizer
    own = {"lr": config.optimizer.lr * config.moe.train.lr_scale, "warmup": 0.1, "decay": "linear", "final": 0.0}
    return config.optimizer.model_copy(update=own)


def training_job(config: RunConfig, model: str) -> TrainingJob:
    """Return the job of one of `model_names`.

    Raises ConfigError for any other name, and for a layout that cannot split the batch.
    """
    budget = config.budget
    batch = budget.sequences
    weights = {name: domain.weight for name, domain in config.domains.items()}
    if model == SEED:
        total = budget.seed_schedule_steps
        job = TrainingJob(
            model=model,
            branch=None,
            weights=weights,
            part=None,
            steps=budget.seed_steps,
            sequences=batch,
            batch_share=1.0,
            first_sample=0,
            # Seed and dense share one order of samples, so that dense continues where the seed LM ended.
            samples=total * batch,
            progress=(0.0, budget.seed_steps / total),
            layout=config.shared_layout,
        )
    elif model == DENSE or model in config.longer_dense_models:
        factor = config.longer_dense_models.get(model, 1.0)
        # A longer baseline branches from the seed LM for more steps, with a slower decay and its own order of samples.
        first_sample = budget.seed_steps * batch if model == DENSE else 0
        job = _with_stretches(
            config,
            TrainingJob(
                model=model,
                branch=BranchConfig(),
                weights=weights,
                part=None,
                steps=0,
                sequences=batch,
                batch_share=1.0,
                first_sample=first_sample,
                samples=0,
                progress=(0.0, 1.0),
                layout=config.shared_layout,
            ),
            [round(total * factor) - budget.seed_steps for total in budget.schedule_steps_of(model)],
        )
    elif model == MOE and config.moe is not None:
        job = _mixture_job(config, config.moe)
    else:
        job = _expert_job(config, model)
    for problem in job.layout.batch_problems(job.sequences):
        raise ConfigError(f"{model}: {problem}")
    return job


def _mixture_job(config: RunConfig, moe: MoeConfig) -> TrainingJob:
    """Return the job of the mixture of experts, which trains on the domains of its experts as dense does."""
    sequences = mixture_sequences(config)
    steps = round(moe.train.budget_share * config.budget.tokens / (sequences * config.budget.sequence_length))
    steps = max(1, steps) if moe.train.budget_share else 0
    return TrainingJob(
        model=MOE,
        branch=None,
        weights={name: config.expert_domains[name].weight for name in mixture_experts(config)},
        part=None,
        steps=steps,
        sequences=sequences,
        batch_share=sequences / config.budget.sequences,
        first_sample=0,
        samples=steps * sequences,
        progress=(0.0, 1.0),
        layout=mixture_layout(config),
        trains=moe.train.parameters,
        mixture=moe.train,
    )


def _expert_job(config: RunConfig, model: str) -> TrainingJob:
    """Return the job of an expert, or of a model of the random split, which trains like an expert on all domains."""
    part = None
    if model in config.random_split_models:
        weights = {name: domain.weight for name, domain in config.domains.items()}
        part = (int(model.removeprefix(RANDOM_SPLIT)), len(config.domains))
    elif model in config.expert_domains:
        weights = {model: 1.0}
    else:
        raise ConfigError(unknown_name("model", model, model_names(config)))
    budget, number = config.budget, len(config.domains)
    own = config.experts.get(model)
    # As many steps as dense takes after the seed LM, each with an equal fraction of its batch.
    sequences = config.expert_sequences(model)
    tokens = [(total - budget.seed_steps) * budget.batch_tokens / number for total in budget.schedule_steps_of(model)]
    if own is not None and own.tokens is not None:
        tokens = [own.tokens]
    job = TrainingJob(
        model=model,
        branch=config.branch(model),
        weights=weights,
        part=part,
        steps=0,
        sequences=sequences,
        batch_share=sequences / (budget.batch_tokens // budget.sequence_length),
        first_sample=0,
        samples=0,
        progress=(0.0, 1.0),
        layout=config.expert_layout(model),
        trains=own.train if own is not None else "all",
    )
    # With seed share 1, the budget leaves the branches nothing until it is raised.
    steps = [max(1, round(count / (sequences * budget.sequence_length))) if count else 0 for count in tokens]
    if not steps[-1]:
        _require_seed_bits(config, model)
    return _with_stretches(config, job, steps)


def _require_seed_bits(config: RunConfig, name: str) -> None:
    """Raise ConfigError if an expert without steps would be anything but a copy of a seed LM that has its domain."""
    if config.branch(name) is None:
        raise ConfigError(
            f"experts.{name}: budget.seed_share 1 leaves it no tokens, and its own model starts at random. Set "
            f"experts.{name}.tokens, or remove its model."
        )
    if name in config.added_domains:
        raise ConfigError(
            f"added_domains.{name}: budget.seed_share 1 leaves its expert no tokens, and the seed LM does not train "
            f"on added domains. Set experts.{name}.tokens with experts.{name}.branch.schedule: restarted, or raise "
            "budget.tokens."
        )


def _with_stretches(config: RunConfig, job: TrainingJob, steps: Sequence[int]) -> TrainingJob:
    """Return the job with its steps under each budget that it is trained with, or under the first alone."""
    seed_steps, seed_total = config.budget.seed_steps, config.budget.seed_schedule_steps
    first = next(filter(None, steps), 1)  # for which the warmup was chosen
    stretches = []
    for count, total in zip(steps, config.budget.schedule_steps_of(job.model), strict=False):
        carried = job.branch is not None and job.branch.schedule == "carried"
        progress = (seed_steps / total if carried else 0.0, 1.0)
        scale = seed_total / total if carried or not count else first / count
        stretches.append(Stretch(count, job.first_sample + count * job.sequences, progress, scale))
    *earlier, last = stretches
    job = replace(job, steps=last.steps, samples=last.samples, progress=last.progress, warmup_scale=last.warmup_scale)
    if config.optimizer.decay == "wsd":
        # The rate does not depend on the budget until the decay begins, so that there is one schedule.
        begin, end = last.progress
        earlier = [
            replace(
                one, progress=(begin, begin + (end - begin) * one.steps / last.steps), warmup_scale=last.warmup_scale
            )
            for one in earlier
        ]
        job = replace(job, stable_steps=_stable_steps(config, job))
    return replace(job, earlier=tuple(one for one in earlier if one.steps < last.steps))


def _stable_steps(config: RunConfig, job: TrainingJob) -> int:
    """Return the steps before the decay and before the last part of the schedule, which has other domain weights."""
    last = config.budget.last
    until = min(config.optimizer.stable_share, 1.0 - (last.share if last is not None else 0.0))
    begin, end = job.progress
    steps = max(0, math.floor((until - begin) / (end - begin) * job.steps + _ROUNDING))
    return steps - steps % job.layout.sync_every


def is_trained(config: RunConfig, run: RunDir, model: str) -> bool:
    """Return whether a model is finished, also with the steps that a raised budget has added."""
    if not is_finished(run.model(model)):
        return False
    if model == MOE:
        return _is_current(config, run)
    earlier = {stretch.steps for stretch in training_job(config, model).earlier}
    return not earlier or read_expert(run.model(model)).steps not in earlier


def mixture_settings(config: RunConfig) -> dict[str, Any]:
    """Return what the card of the run's mixture records of the section `moe`."""
    moe = config.moe
    assert moe is not None
    recipe = {"top_k": moe.top_k, "router": moe.router}
    recipe |= {"random_seed": config.random_seed} if moe.router == "random" else {}
    return recipe | ({"train": moe.train.model_dump()} if moe.train.budget_share else {})


def _is_current(config: RunConfig, run: RunDir) -> bool:
    """Return whether the mixture is that of the section `moe`, and of the experts as they are now."""
    card, wanted = read_expert(run.model(MOE)), mixture_settings(config)
    experts = {name: find_expert(run.model(name)) for name in mixture_experts(config)}
    settings = ("top_k", "router", "random_seed", "train", "shared_expert")
    is_same = all(card.layout.get(name) == wanted.get(name) for name in settings)
    hashes = {name: expert.content_hash for name, expert in experts.items() if expert is not None}
    return is_same and card.data_fingerprint == hashes


def training_stages(config: RunConfig) -> list[list[str]]:
    """Return the models to train, stage by stage. Models of a stage can train in parallel; the longest come first.

    An expert is in the stage after its last parent; one whose parents are chosen by score, after all earlier experts.
    """
    stage_of = {SEED: 0}
    for model in model_names(config):
        if model == SEED:
            continue
        if model == MOE:  # the last of `model_names`
            stage_of[model] = 1 + max(stage_of.values())
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
