"""The progress of a job at a checkpoint, and the state of its random generator."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import AfterValidator

from btm_scale.checkpoint.formats.locate import STATE_MARKER
from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """The progress of a job at a checkpoint."""

    step: int
    adam_steps: int
    random_state: str  # state of torch's CPU generator, base64
    loss_scale: dict[str, float] = field(default_factory=dict)  # fp16 only


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("must be base64") from None
    return text


RandomState = Annotated[str, AfterValidator(_base64)]


def random_state() -> str:
    """Return the state of torch's CPU generator, base64."""
    return base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def restore_random_state(position: Position) -> None:
    """Restore the state of torch's CPU generator. Raises CheckpointError for the state of another generator."""
    data = bytearray(base64.b64decode(position.random_state))
    try:
        torch.set_rng_state(torch.frombuffer(data, dtype=torch.uint8))
    except (RuntimeError, ValueError, TypeError):
        raise CheckpointError(
            f"The random_state in {STATE_MARKER} of step {position.step} has {len(data)} bytes, and is not a state of "
            "PyTorch's CPU generator. Delete this checkpoint, and training resumes from the one before it."
        ) from None
