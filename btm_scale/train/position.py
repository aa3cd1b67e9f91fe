"""state.json, the marker of a training checkpoint: the position of a job, and what each rank wrote."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator

from btm_scale.checkpoint.formats.locate import STATE_MARKER
from btm_scale.errors import CheckpointError
from btm_scale.train.state_file import WrittenPart
from btm_scale.util.records import Record, is_empty


@dataclass(frozen=True)
class Position:
    """The progress of a job at a checkpoint."""

    step: int
    adam_steps: int
    random_state: str  # state of torch's CPU generator, base64
    loss_scale: dict[str, float] = field(default_factory=dict)  # fp16 only
    decay_end: int | None = None  # in the decay of wsd: the step at which it ends
    router_load: tuple[tuple[float, ...], ...] = ()  # of a mixture of experts: what the next step balances by


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("must be base64") from None
    return text


RandomState = Annotated[str, AfterValidator(_base64)]


class Marker(Record):
    """state.json: the position, and the parts of the tensors with their digests."""

    SCHEMA = 3
    ERROR = CheckpointError
    ABSENT = "{folder} is not a complete checkpoint: it has no state.json. Use another one."
    REMEDY = "Delete {folder}, and training resumes from the checkpoint before it."

    step: int = Field(ge=0, le=1 << 62)
    adam_steps: int = Field(ge=0, le=1 << 62)
    random_state: RandomState
    loss_scale: dict[str, int | float] = {}
    decay_end: int | None = Field(None, ge=0, le=1 << 62, exclude_if=is_empty)
    router_load: tuple[tuple[float, ...], ...] = Field((), exclude_if=is_empty)
    parts: tuple[WrittenPart, ...] = ()  # by rank
    equal_parts: tuple[str, ...] = Field((), exclude_if=is_empty)  # digests of equal ranges; schema 2
    sha256: str | None = Field(None, exclude_if=is_empty)  # of the complete file; schema 1

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Return schema 1, which had one digest, or 2, whose parts were equal ranges of every tensor, as schema 3."""
        if not isinstance(content, dict):
            return content
        if content.get("schema", 1) == 1 and isinstance(content.get("sha256"), str):
            return content | {"schema": 3}
        if content.get("schema") == 2:
            parts = {"equal_parts": content["parts"]} if content.get("parts") else {}
            return {name: value for name, value in content.items() if name != "parts"} | {"schema": 3} | parts
        return content

    @model_validator(mode="after")
    def _has_digests(self) -> Marker:
        if not self.parts and not self.equal_parts and self.sha256 is None:
            raise ValueError("equal_parts, parts or sha256 is required")
        return self

    @property
    def position(self) -> Position:
        """The progress of the job."""
        return Position(
            self.step, self.adam_steps, self.random_state, self.loss_scale, self.decay_end, self.router_load
        )


def state_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint; None for another name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def read_position(path: Path) -> Position:
    """Return the progress recorded in a checkpoint. Raises CheckpointError if it is incomplete."""
    return Marker.load(path / STATE_MARKER).position


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
