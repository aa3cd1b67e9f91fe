"""The sections of a run's YAML on training: budget, optimizer, branches, checkpoints, health and profile."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from btm_scale.config.section import Section


class LastPartConfig(Section):
    """Other shares of the domains in the last part of the schedule."""

    share: float = Field(gt=0, lt=1, description="of the schedule")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="by how much a domain's share is multiplied then"
    )


class BudgetConfig(Section):
    """The compute of the forest, and so of the dense baseline."""

    tokens: int = Field(default=6_000_000, gt=0)
    seed_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="of the tokens; 0 takes a pretrained model for the seed LM as it is",
    )
    sequence_length: int = Field(default=256, gt=1)
    batch_tokens: int = Field(default=16_384, gt=0)
    last: LastPartConfig | None = None

    @model_validator(mode="after")
    def _whole_sequences(self) -> BudgetConfig:
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length {self.sequence_length}; "
                f"use {max(1, round(self.batch_tokens / self.sequence_length)) * self.sequence_length}"
            )
        if (self.seed_steps < 1 and self.seed_share > 0) or self.branch_steps < 1:
            raise ValueError(
                f"{self.tokens} tokens in batches of {self.batch_tokens} leave no step for seed or experts; "
                "raise tokens or lower batch_tokens"
            )
        return self

    @property
    def sequences(self) -> int:
        """Sequences in a batch of the seed LM and the dense baseline."""
        return self.batch_tokens // self.sequence_length

    @property
    def seed_steps(self) -> int:
        """Optimizer steps of the seed LM."""
        return round(self.tokens * self.seed_share / self.batch_tokens)

    @property
    def branch_steps(self) -> int:
        """Optimizer steps of the dense baseline after the seed, and of every expert."""
        return round(self.tokens / self.batch_tokens) - self.seed_steps


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its schedule, which runs over seed and branch as one."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.95), description="at a batch of budget.batch_tokens")
    scale_beta2: bool = Field(
        default=True, description="average second moments over as many tokens whatever an expert's batch"
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 leaves gradients as they are")
    warmup: float = Field(default=0.08, ge=0, lt=1, description="share of the schedule")
    decay: Literal["linear", "cosine", "constant"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end, as a share of lr")

    def betas_at(self, batch_share: float) -> tuple[float, float]:
        """The betas for a batch of `batch_share` times budget.batch_tokens.

        beta2 keeps its half-life in tokens, beta1 its half-life in steps (arXiv 2507.07101).
        """
        first, second = self.betas
        return (first, second**batch_share) if self.scale_beta2 else (first, second)

    def rate(self, progress: float) -> float:
        """The learning rate at `progress` in (0, 1] of the schedule."""
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        if self.decay == "constant":
            return self.lr
        rest = (1.0 - progress) / (1.0 - self.warmup)
        if self.decay == "cosine":
            rest = 0.5 * (1.0 - math.cos(math.pi * rest))
        return self.lr * (self.final + (1.0 - self.final) * rest)


class BranchConfig(Section):
    """What an expert begins with, and how its schedule goes on."""

    parents: Literal["seed", "nearest", "posterior"] | dict[str, float] = Field(
        default="seed",
        description="`nearest`: the expert that likes the domain's dev text best; `posterior`: all, by the domain's "
        "prior; or weights by name",
    )
    optimizer: Literal["carried", "fresh"] = "carried"
    schedule: Literal["carried", "restarted"] = Field(
        default="carried", description="go on along the seed's schedule, or warm up and decay once more"
    )
    replay: float = Field(default=0.0, ge=0, lt=1, description="share of text from the parents' domains")

    @model_validator(mode="after")
    def _weighed(self) -> BranchConfig:
        weights = self.parents.values() if isinstance(self.parents, dict) else [1.0]
        if min(weights, default=-1.0) < 0 or sum(weights) <= 0:
            raise ValueError(f"parents {self.parents}: weights must be at least 0 and weigh somebody")
        return self


class CheckpointConfig(Section):
    """When a training state is saved, and how many are kept."""

    every: int = Field(default=100, gt=0, description="steps")
    keep: int = Field(default=2, gt=0)


class HealthConfig(Section):
    """When a batch counts as bad, and when a group counts as hung."""

    spike: float | None = Field(
        default=None,
        gt=1,
        description="skip a batch whose gradient norm exceeds this many times the running median",
    )
    window: int = Field(
        default=50, ge=5, description="steps of that median; until half as many are known, no norm counts as a spike"
    )
    skips: int = Field(default=10, ge=0, description="bad batches to leave out before training is given up")
    hang: float = Field(default=20.0, gt=1, description="a step that takes this many times the median is a hang")
    patience: float = Field(default=300.0, gt=0, description="seconds that any step may take")


class ProfileConfig(Section):
    """A look at where a step's time goes."""

    steps: int = Field(default=0, ge=0, description="steps to record with PyTorch's profiler; 0 records none")
    after: int = Field(default=10, ge=0, description="steps of a start that pass first")
