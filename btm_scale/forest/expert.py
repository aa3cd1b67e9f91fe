"""An expert on disk: a Hugging Face model directory, and expert.json, which makes it one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from btm_scale.errors import ForestError
from btm_scale.util.files import write_file

CARD = "expert.json"
_SCHEMA = 1


@dataclass(frozen=True)
class Parent:
    """A model whose weights an expert began with, and its share of them."""

    name: str
    weight: float


@dataclass(frozen=True)
class Expert:
    """What expert.json says."""

    name: str
    domains: dict[str, float]  # the domains it was trained on, with their shares
    parents: tuple[Parent, ...]
    tokens: int  # trained on by this model itself, its parents' not counted
    steps: int
    layout: dict[str, Any]
    data_fingerprint: dict[str, str]  # by domain; of an average: the content hash of each parent
    content_hash: str
    schema: int = field(default=_SCHEMA)

    def save(self, directory: Path) -> None:
        """Write the card, the last file of a finished model."""
        write_file(directory / CARD, json.dumps(asdict(self), indent=2) + "\n")


def read_expert(directory: Path) -> Expert:
    """The card of a finished model. Raises ForestError if there is none or it is of another make."""
    path = directory / CARD
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
    except FileNotFoundError:
        raise ForestError(f"{directory} is no finished expert: it has no {CARD}; train it, or name another") from None
    except ValueError as error:
        raise ForestError(f"{path} is not valid JSON ({error}); restore it, or train the expert again") from None
    if values.get("schema") != _SCHEMA:
        raise ForestError(f"{path} has schema {values.get('schema')}, this version reads {_SCHEMA}; update btm-scale")
    try:
        parents = tuple(Parent(**parent) for parent in values.pop("parents"))
        return Expert(**values, parents=parents)
    except (KeyError, TypeError) as error:
        raise ForestError(f"{path} is incomplete: {error}; restore it, or train the expert again") from None


def is_finished(directory: Path) -> bool:
    """Whether a model directory is complete."""
    return (directory / CARD).is_file()
