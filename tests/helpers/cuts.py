"""Split a test matrix: cases that `make test` runs, and cases that only `make test-full` runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")
Settings = Mapping[str, Any]


def full(*values: Any, id: str | None = None) -> Any:
    """Return a case that only `make test-full` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.full)


def cut(cases: Iterable[Case], quick: Callable[[Case], bool], name: Callable[[Case], str] = str) -> list[Any]:
    """Return one parameter per case. `make test` runs the cases that `quick` selects, `make test-full` the others."""
    return [pytest.param(case, id=name(case)) if quick(case) else full(case, id=name(case)) for case in cases]


def all_pairs(cases: Sequence[Settings]) -> list[Settings]:
    """Return a few of the cases that together cover every pair of values in `cases`."""
    pairs = [set(itertools.combinations(case.items(), 2)) for case in cases]
    missing, selected = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        selected.append(cases[best])
    return selected
