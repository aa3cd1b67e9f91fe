"""A claim of a paper, the figures that answer it, and the verdict that they give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HOLDS, IN_PART, NOT_HERE = "holds", "holds in part", "does not hold at this size"
UNDECIDED, NOT_MEASURED = "undecided", "not measured"  # undecided: all values are limits on the wrong side of the bound


class NotMeasuredError(LookupError):
    """A result, or a unit of it, does not exist yet."""


@dataclass(frozen=True)
class Bound:
    """The values of a figure with which a claim is true."""

    sign: Literal["<", ">"]
    limit: float

    def is_met(self, value: float) -> bool:
        """Return whether a value is strictly on the claim's side of the limit."""
        return value < self.limit if self.sign == "<" else value > self.limit

    def decided(self, value: float, beyond: str = "") -> bool | None:
        """Return whether a value meets the bound; None if `beyond` says that it is a limit which does not decide it.

        `beyond` is `<` if the value is less than `value`, and `>` if it is more.
        """
        if not beyond:
            return self.is_met(value)
        reaches = value >= self.limit if beyond == ">" else value <= self.limit
        return (beyond == self.sign) if reaches else None

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """One number per random seed. Without a bound it is shown and has no part in the verdict."""

    label: str
    by_seed: Mapping[int, float]
    bound: Bound | None = None
    beyond: Mapping[int, str] = field(default_factory=dict)  # by seed: `<` or `>` where the value is only a limit

    def __post_init__(self) -> None:
        if not self.by_seed:
            raise NotMeasuredError(f"'{self.label}' has no random seed.")

    def decided(self) -> dict[int, bool]:
        """Return whether each random seed meets the bound, without those whose limits do not decide it."""
        if self.bound is None:
            return {}
        met = {seed: self.bound.decided(value, self.beyond.get(seed, "")) for seed, value in self.by_seed.items()}
        return {seed: one for seed, one in met.items() if one is not None}


class Evidence:
    """The JSON files of a folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def document(self, name: str) -> dict[str, Any]:
        """Return a result. Raises NotMeasuredError if there is none."""
        path = self.path(name)
        if not path.is_file():
            raise NotMeasuredError(f"There is no result '{name}'.")
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def path(self, name: str) -> Path:
        """Return the path of a result, which may not exist."""
        return self.folder / f"{name}.json"

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Return the results.json of each run of a result that benchmarks/record.py wrote."""
        return [run["results"] for run in self.document(name)["runs"]]

    def units(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the units of a result that benchmarks/units.py wrote."""
        units: dict[str, dict[str, Any]] = self.document(name)["units"]
        return units


@dataclass(frozen=True)
class Claim:
    """What a paper says, what was run here, and how the figures are read."""

    title: str  # the heading on the page
    text: str
    source: str  # paper and section
    size: str  # of what was run here
    command: str
    results: tuple[str, ...]  # names of the JSON files
    read: Callable[[Evidence], Sequence[Figure]]
    reason: str = ""  # why the figures differ from the paper, probably; shown if they do
    draw: Callable[[Evidence], str] | None = None  # an SVG of the figures; raises NotMeasuredError without them


@dataclass(frozen=True)
class Judged:
    """A claim with its figures, none if it is not measured, and its verdict."""

    claim: Claim
    figures: Sequence[Figure]
    verdict: str
    seeds: tuple[int, int] = (0, 0)  # the fewest and the most random seeds of a figure with a bound

    @property
    def sentence(self) -> str:
        """The verdict; a single random seed is part of it."""
        fewest, most = self.seeds
        if fewest == 1:
            return f"{self.verdict} ({'one seed' if most == 1 else 'some figures of one seed'})"
        return self.verdict

    @property
    def contradicts(self) -> bool:
        """Whether a figure does not meet its bound."""
        return self.verdict in (IN_PART, NOT_HERE)


def judged(claim: Claim, evidence: Evidence) -> Judged:
    """Read the figures of a claim, and compare each random seed's with the bound."""
    try:
        figures = list(claim.read(evidence))
    except NotMeasuredError:
        return Judged(claim, [], NOT_MEASURED)
    bounded = [figure for figure in figures if figure.bound is not None]
    if not bounded:
        raise ValueError(f"No figure of '{claim.title}' has a bound. A claim that no figure can refute has no verdict.")
    decided = [by_seed for figure in bounded if (by_seed := figure.decided())]
    met = [value for by_seed in decided for value in by_seed.values()]
    if not met:
        return Judged(claim, figures, UNDECIDED)
    verdict = HOLDS if all(met) else IN_PART if any(met) else NOT_HERE
    counts = [len(by_seed) for by_seed in decided]
    return Judged(claim, figures, verdict, (min(counts), max(counts)))
