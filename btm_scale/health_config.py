"""What a run's YAML may say about watching a training: the sections `health` and `profile`."""

from __future__ import annotations

from pydantic import Field

from btm_scale.section import Section


class HealthConfig(Section):
    """When a batch counts as bad, and when a group counts as hung."""

    spike: float | None = Field(
        default=None,
        gt=1,
        description="a gradient norm so many times the median of recent ones is a bad batch's",
    )
    window: int = Field(default=50, ge=5, description="steps that are recent; before so many, nothing is a spike")
    skips: int = Field(default=10, ge=0, description="bad batches to leave out before training is given up")
    hang: float = Field(default=20.0, gt=1, description="a step that takes so many times the median hangs")
    patience: float = Field(default=300.0, gt=0, description="seconds that any step may take")


class ProfileConfig(Section):
    """A look at where a step's time goes."""

    steps: int = Field(default=0, ge=0, description="steps to record with PyTorch's profiler; 0 records none")
    after: int = Field(default=10, ge=0, description="steps of a start that pass first")
