"""An expert on disk: a Hugging Face model directory, and expert.json, which makes it one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from btm_scale.errors import ForestError
from btm_scale.util.records import Record

CARD = "expert.json"


@dataclass(frozen=True)
class Parent:
    """A model whose weights an expert began with, and its share of them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    weight: float


class Expert(Record):
    """What expert.json says."""

    ERROR = ForestError
    ABSENT = f"{{folder}} is not a finished expert: it has no {CARD}. Train it, or name another."
    REMEDY = "Restore it, or train the expert again."

    name: str
    domains: dict[str, float]  # the domains it was trained on, with their shares
    parents: tuple[Parent, ...]
    tokens: int  # trained on by this model itself, its parents' not counted
    steps: int
    layout: dict[str, Any]
    data_fingerprint: dict[str, str]  # by domain; of an average: the content hash of each parent
    content_hash: str


def read_expert(directory: Path) -> Expert:
    """The card of a finished model. Raises ForestError if there is none, or it is damaged or of another schema."""
    return Expert.load(directory / CARD)


def is_finished(directory: Path) -> bool:
    """Whether a model directory is complete."""
    return (directory / CARD).is_file()
