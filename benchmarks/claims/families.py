"""A family of runs: one YAML with a run's config, the points at which it is changed, and random seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

import btm_scale.configs
from btm_scale.config.section import Section, explain
from btm_scale.config.yaml import load_yaml
from btm_scale.errors import ConfigError

FOLDER = Path(btm_scale.configs.__file__).parent / "claims"
MOST_MINUTES = 90  # of a unit on two cores


class Point(Section):
    """What one point changes."""

    run: dict[str, Any] = Field(default_factory=dict, description="changes of the family's run, section by section")
    clusters: int | None = Field(default=None, gt=1, description="train on clusters of the text instead of its domains")
    minutes: float = Field(gt=0, le=MOST_MINUTES, description="of one random seed on two idle cores, about")
    seeds: tuple[int, ...] | None = Field(default=None, description="random seeds; default: those of the family")


class FamilyConfig(Section):
    """A file of configs/claims."""

    shares: Literal["text", "tokenizer", "nothing"] = Field(description="what all points have from one preparation")
    seeds: tuple[int, ...] = Field(min_length=1, description="random seeds")
    run: dict[str, Any] = Field(description="a run's YAML without text_root and random_seed")
    points: dict[str, Point] = Field(min_length=1, description="points by name")

    @model_validator(mode="after")
    def _points_fit(self) -> FamilyConfig:
        for name, point in self.points.items():
            if point.clusters is not None and self.shares != "tokenizer":
                raise ValueError(f"points.{name} has clusters, which need one tokenizer. Set shares to tokenizer.")
            if point.seeds is not None and not set(point.seeds) <= set(self.seeds):
                raise ValueError(f"points.{name}.seeds has a random seed that `seeds` lacks. Add it there.")
        return self

    @field_validator("points")
    @classmethod
    def _names_of_folders(cls, points: dict[str, Point]) -> dict[str, Point]:
        for name in points:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"'{name}' cannot name a point, since it names a folder: use letters, digits, - and .")
        return points


@dataclass(frozen=True)
class Unit:
    """One run of a family."""

    family: str
    point: str
    seed: int
    minutes: float

    @property
    def name(self) -> str:
        """The name in the family's JSON."""
        return f"{self.point}/seed-{self.seed}"


@dataclass(frozen=True)
class Family:
    """A family by name."""

    name: str
    config: FamilyConfig

    @classmethod
    def load(cls, path: Path) -> Family:
        """Read a file of configs/claims. Raises ConfigError with every problem."""
        try:
            return cls(path.stem, FamilyConfig.model_validate(load_yaml(path)))
        except ValidationError as error:
            raise ConfigError(f"{path}:\n{explain(error, FamilyConfig)}") from None

    def units(self) -> Iterator[Unit]:
        """Yield every unit: all points of a random seed before the next one, so that each seed is a complete curve."""
        for seed in self.config.seeds:
            for point, settings in self.config.points.items():
                if settings.seeds is None or seed in settings.seeds:
                    yield Unit(self.name, point, seed, settings.minutes)

    def values(self, point: str, seed: int, corpora: Path) -> dict[str, Any]:
        """Return the YAML of one run; the domains of a point with clusters are still those of the family."""
        fixed = {"name": self.name, "random_seed": seed, "text_root": str(corpora)}
        return merged(self.config.run, self.config.points[point].run) | fixed

    @property
    def domains(self) -> list[str]:
        """The domains on which every point is compared."""
        sections = ("domains", "added_domains")
        return [name for section in sections for name in self.config.run.get(section, {})]


def families() -> dict[str, Family]:
    """Return every family by name."""
    return {path.stem: Family.load(path) for path in sorted(FOLDER.glob("*.yaml"))}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `changes`, section by section; a list is replaced."""
    result = dict(values)
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], change) if both else change
    return result
