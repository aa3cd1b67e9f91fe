"""The outcome of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # judging a step needs no engine
    from btm_scale.model.moe import Routing


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step."""

    loss: float  # mean, in nats
    gradient_norm: float  # before clipping
    overflowed: bool = False  # fp16 only: the scaled gradients overflowed, and the step was skipped
    routing: Routing | None = None  # of a mixture of experts
