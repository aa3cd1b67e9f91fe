"""An expert on disk: a Hugging Face model directory with a complete expert.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from btm_scale.errors import ForestError
from btm_scale.model.trained import TrainedPart
from btm_scale.util.records import InsideName, Record, is_empty

CARD = "expert.json"


@dataclass(frozen=True)
class Parent:
    """A model that an expert branched from, and its weight among the parents."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: InsideName
    weight: float


class Expert(Record):
    """expert.json: the card of an expert."""

    ERROR = ForestError
    ABSENT = f"{{folder}} is not a finished expert: it has no {CARD}. Train it, or choose another."
    REMEDY = "Restore it, or train the expert again."

    name: InsideName
    domains: dict[InsideName, float]  # the domains it was trained on, as fractions of its text
    parents: tuple[Parent, ...]
    tokens: int  # trained on by this model itself, without its parents'
    steps: int
    layout: dict[str, Any]
    data_fingerprint: dict[str, str]  # by domain; of an average: the content hash of each parent
    content_hash: str
    # The device that trained it; empty for averages and in cards of earlier versions.
    device: str = Field(default="", exclude_if=is_empty)
    # The step with the lowest dev loss, if its weights were exported instead of those of the last step.
    best_step: int = Field(default=0, exclude_if=is_empty)
    # The trained part; the other tensors have the bits of the parents.
    trains: TrainedPart = Field(default="all", exclude_if=lambda part: part == "all")
    # The content hashes of the parents when it branched; absent where not recorded.
    parent_hashes: dict[InsideName, str] = Field(default_factory=dict, exclude_if=is_empty)

    @property
    def scored_hash(self) -> str:
        """The hash that scores are of: for a mixture of experts, also of its top_k, which no tensor records."""
        top_k = self.layout.get("top_k")
        return self.content_hash if top_k is None else f"{self.content_hash}:top_k={top_k}"

    @property
    def joint_steps(self) -> int:
        """The steps of joint training, of a mixture of experts; 0 for any other model."""
        return self.steps if "train" in self.layout else 0


def read_expert(directory: Path) -> Expert:
    """Load the card of a finished model. Raises ForestError if it is missing, damaged or of another schema."""
    return Expert.load(directory / CARD)


def find_expert(directory: Path) -> Expert | None:
    """Load the card of a model, or return None if it is not finished; another process may be removing it.

    Raises ForestError if the card is damaged or of another schema.
    """
    try:
        return read_expert(directory)
    except ForestError:
        if is_finished(directory):
            raise
        return None


def is_finished(directory: Path) -> bool:
    """Return whether a model directory is complete."""
    return (directory / CARD).is_file()
