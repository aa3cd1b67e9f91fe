"""The sections of a run's YAML on training: budget, optimizer, branches, checkpoints, health and profile."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from btm_scale.config.changes import Changes, MayChange
from btm_scale.config.section import Section

_TRAINED_FURTHER = "the seed LM is kept; dense and the experts resume for the added tokens"
_ROUNDING = 1e-9  # of a fraction of the schedule


def _only_raised(before: BudgetConfig, after: BudgetConfig) -> str:
    return "" if after.tokens > before.tokens else "a budget can be raised, not lowered"


class LastPartConfig(Section):
    """Different domain weights in the last part of the schedule."""

    share: float = Field(gt=0, lt=1, description="fraction of the schedule")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="factor by domain on its sampling weight"
    )


class BudgetConfig(Section):
    """The compute of the forest, which is also that of the dense baseline."""

    tokens: Annotated[int, Changes(unless=_only_raised, effect=_TRAINED_FURTHER)] = Field(
        default=6_000_000, gt=0, description="training tokens in all; dense gets the same number"
    )
    seed_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="fraction of the tokens for the seed LM; 0: a pretrained model unchanged, or a random "
        "initialization; 1: dense and the experts take no step",
    )
    sequence_length: int = Field(default=256, gt=1, description="tokens per sequence")
    batch_tokens: int = Field(
        default=16_384, gt=0, description="tokens per step of seed and dense; the experts share one such batch"
    )
    max_passes: MayChange[float | None] = Field(
        default=None,
        gt=0,
        description="refuse to train if the seed LM and an expert pass over the train split of a domain more often",
    )
    last: LastPartConfig | None = Field(default=None, description="other domain weights at the end of the schedule")
    seed_budget: int | None = Field(
        default=None,
        gt=0,
        description="`tokens` when the seed LM was trained; recorded by the run when `tokens` is raised",
    )
    raised_from: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(),
        description="`tokens` of the budgets that dense or experts were trained with before; recorded by the run",
    )
    first_budgets: dict[str, Annotated[int, Field(gt=0)]] = Field(
        default_factory=dict,
        description="`tokens` of the first budget of each model that began after `tokens` was raised; recorded by the "
        "run",
    )

    @model_validator(mode="after")
    def _complete_sequences(self) -> BudgetConfig:
        if problem := self.batch_problem(self.batch_tokens):
            raise ValueError(problem)
        budgets = [*([self.seed_budget] if self.seed_budget is not None else []), *self.raised_from, self.tokens]
        if budgets != sorted(budgets) or len({*self.raised_from, self.tokens}) <= len(self.raised_from):
            raise ValueError(
                f"seed_budget, raised_from and tokens are {', '.join(map(str, budgets))}, which do not increase. The "
                "run records the first two when tokens is raised: remove them from the YAML."
            )
        if (self.seed_steps < 1 and self.seed_share > 0) or (self.branch_steps < 1 and self.seed_share < 1):
            raise ValueError(
                f"{self.tokens} tokens in batches of {self.batch_tokens} give less than one step to seed or experts. "
                "Raise tokens, lower batch_tokens, or change seed_share: 0 leaves all steps to the experts, 1 to the "
                "seed LM."
            )
        return self

    def batch_problem(self, batch_tokens: int | None) -> str | None:
        """Return why a model's batch cannot have this many tokens; None if it can, or has the default."""
        if batch_tokens is None or batch_tokens % self.sequence_length == 0:
            return None
        sequences = max(1, round(batch_tokens / self.sequence_length))
        return (
            f"batch_tokens {batch_tokens} is not a multiple of sequence_length {self.sequence_length}. "
            f"A batch has complete sequences: use {sequences * self.sequence_length}."
        )

    @property
    def sequences(self) -> int:
        """Sequences per batch of the seed LM and the dense baseline."""
        return self.batch_tokens // self.sequence_length

    @property
    def seed_steps(self) -> int:
        """Optimizer steps of the seed LM, which a raised budget does not change."""
        return round((self.seed_budget or self.tokens) * self.seed_share / self.batch_tokens)

    @property
    def seed_schedule_steps(self) -> int:
        """Optimizer steps of the schedule that the seed LM was trained with, those of the branches included."""
        return round((self.seed_budget or self.tokens) / self.batch_tokens)

    @property
    def schedule_steps(self) -> tuple[int, ...]:
        """Optimizer steps of the schedule under each budget that branches are trained with, the seed's included."""
        return tuple(round(tokens / self.batch_tokens) for tokens in (*self.raised_from, self.tokens))

    def schedule_steps_of(self, model: str) -> tuple[int, ...]:
        """Return `schedule_steps` without the budgets that were raised before this model began."""
        first = self.first_budgets.get(model, 0)
        budgets = (*(tokens for tokens in self.raised_from if tokens >= first), self.tokens)
        return tuple(round(tokens / self.batch_tokens) for tokens in budgets)

    @property
    def branch_steps(self) -> int:
        """Optimizer steps of each expert, and of the dense baseline after the seed; 0 with seed share 1."""
        return round(self.tokens / self.batch_tokens) - self.seed_steps


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, which spans seed and branch."""

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.95), description="for a batch of budget.batch_tokens")
    scale_beta2: bool = Field(
        default=True, description="keep the half-life of second moments in tokens when an expert's batch is smaller"
    )
    eps: float = Field(default=1e-8, gt=0, description="epsilon of AdamW")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay of matrices")
    clip: float = Field(default=1.0, ge=0, description="maximum gradient norm; 0 disables clipping")
    warmup: float = Field(default=0.08, ge=0, lt=1, description="fraction of the schedule")
    decay: Literal["linear", "cosine", "constant", "wsd"] = Field(
        default="linear",
        description="schedule after the warmup; wsd (warmup, stable, decay): constant, then linear in `decay_share`",
    )
    decay_share: float = Field(
        default=0.2, gt=0, le=1, description="fraction of the schedule in which wsd decays, at its end"
    )
    final: float = Field(default=0.0, ge=0, le=1, description="final learning rate, as a fraction of lr")

    def betas_at(self, batch_share: float) -> tuple[float, float]:
        """Return (beta1, beta2) for a batch of `batch_share` times budget.batch_tokens.

        beta2 keeps its half-life in tokens, beta1 its half-life in steps (arXiv 2507.07101).
        """
        first, second = self.betas
        return (first, second**batch_share) if self.scale_beta2 else (first, second)

    @model_validator(mode="after")
    def _phases_fit(self) -> OptimizerConfig:
        if self.decay == "wsd" and self.warmup + self.decay_share > 1:
            raise ValueError(
                f"warmup {self.warmup} and decay_share {self.decay_share} are more than the schedule. Together they "
                "may be 1: lower one of them."
            )
        return self

    def rate(self, progress: float, warmup_scale: float = 1.0) -> float:
        """Return the learning rate at `progress`, a fraction of the schedule in (0, 1].

        `warmup_scale`: the length of the schedule for which `warmup` was chosen, as a fraction of this schedule's.
        """
        warmup = self.warmup * warmup_scale
        if progress < warmup:
            return self.lr * progress / warmup
        if self.decay == "constant" or (self.decay == "wsd" and progress <= self.stable_share + _ROUNDING):
            return self.lr
        rest = (1.0 - progress) / (self.decay_share if self.decay == "wsd" else 1.0 - warmup)
        if self.decay == "cosine":
            rest = 0.5 * (1.0 - math.cos(math.pi * rest))
        return self.lr * (self.final + (1.0 - self.final) * rest)

    @property
    def stable_share(self) -> float:
        """The fraction of the schedule before wsd decays."""
        return 1.0 - self.decay_share


class BranchConfig(Section):
    """What an expert starts from, and how its schedule continues."""

    parents: Literal["seed", "nearest", "posterior"] | dict[str, float] = Field(
        default="seed",
        description="seed, nearest (the expert with the lowest dev loss), posterior (all, weighted by the domain's "
        "prior), or weights by name",
    )
    optimizer: Literal["carried", "fresh"] = Field(
        default="carried", description="start from the parents' moments, or from zero"
    )
    schedule: Literal["carried", "restarted"] = Field(
        default="carried", description="continue the schedule of the seed, or warm up and decay again"
    )
    replay: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the text that comes from the parents' domains"
    )

    @model_validator(mode="after")
    def _weighted(self) -> BranchConfig:
        weights = self.parents.values() if isinstance(self.parents, dict) else [1.0]
        if min(weights, default=-1.0) < 0 or sum(weights) <= 0:
            raise ValueError(
                f"Invalid weights of parents {self.parents}. Weights must be non-negative and not all zero."
            )
        return self


class CheckpointConfig(Section):
    """When a checkpoint is saved, and how many are kept."""

    every: int = Field(default=100, gt=0, description="steps between checkpoints")
    keep: int = Field(default=2, gt=0, description="newest checkpoints to keep")


def _decides(before: DevLossConfig, after: DevLossConfig) -> str:
    if all(one.patience is None and not one.best for one in (before, after)):
        return ""
    return "the dev losses decide which weights result"


_Measured = Changes(unless=_decides)


class DevLossConfig(Section):
    """Loss on dev text during training. Early stopping and the best checkpoint are of all models but the seed LM."""

    every: Annotated[int, _Measured] = Field(default=0, ge=0, description="steps between measurements; 0: none")
    tokens: Annotated[int, _Measured] = Field(
        default=16_384, gt=0, description="largest number of dev tokens of each domain that the model trains on"
    )
    patience: int | None = Field(
        default=None, gt=0, description="end training after this many measurements without a lower loss"
    )
    best: bool = Field(default=False, description="export the checkpoint with the lowest loss, instead of the last")

    @model_validator(mode="after")
    def _measured(self) -> DevLossConfig:
        if not self.every and (self.patience is not None or self.best):
            raise ValueError(
                "patience and best need dev losses, and every is 0. Set every to the steps between measurements."
            )
        return self


class HealthConfig(Section):
    """When a batch counts as bad, when a group counts as hung, and whether a GPU repeats its bits."""

    spike: float | None = Field(
        default=None,
        gt=1,
        description="skip a batch whose gradient norm exceeds this many times the running median",
    )
    window: int = Field(
        default=50, ge=5, description="steps of the running median; no norm is a spike before half of them"
    )
    skips: int = Field(default=10, ge=0, description="bad batches to skip before training fails")
    hang: float = Field(
        default=20.0, gt=1, description="a step that takes this many times the median step time is a hang"
    )
    patience: float = Field(default=300.0, gt=0, description="seconds that a step may always take")
    deterministic: bool = Field(
        default=False, description="bit-identical weights on GPUs too, by slower kernels that add in a fixed order"
    )


class ProfileConfig(Section):
    """Where the time of a step goes, by PyTorch's profiler."""

    steps: int = Field(default=0, ge=0, description="steps to record; 0 disables the profiler")
    after: int = Field(default=10, ge=0, description="steps to skip before recording")
