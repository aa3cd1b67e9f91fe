"""The two cuts of a matrix: what `make test` runs of it, and what only `make test-full` runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")
Settings = Mapping[str, Any]


def full(*values: Any, id: str | None = None) -> Any:
    """A case that only `make test-full` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.full)


def cut(cases: Iterable[Case], quick: Callable[[Case], bool], name: Callable[[Case], str] = str) -> list[Any]:
    """One parameter per case. `make test` runs the cases that `quick` chooses, `make test-full` the others."""
    return [pytest.param(case, id=name(case)) if quick(case) else full(case, id=name(case)) for case in cases]


def all_pairs(cases: Sequence[Settings]) -> list[Settings]:
    """Return a few of the cases, in which every two values that any case combines are still combined."""
    pairs = [set(itertools.combinations(case.items(), 2)) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(cases[best])
    return chosen
