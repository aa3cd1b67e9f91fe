"""The cut of `make test` leaves out nothing but repetitions."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from helpers.cuts import all_pairs, cut

ROOT = Path(__file__).parents[2]


def test_the_chosen_cases_combine_every_two_settings_that_any_case_combines() -> None:
    every = [
        dict(zip("abcd", values, strict=True)) for values in itertools.product(range(2), range(3), "xyz", range(2))
    ]
    allowed = [case for case in every if case["a"] or case["c"] != "z"]
    chosen = all_pairs(allowed)

    def pairs(cases: list[dict[str, object]]) -> set[object]:
        return set().union(*(itertools.combinations(case.items(), 2) for case in cases))

    assert pairs(chosen) == pairs(allowed)
    assert len(chosen) < len(allowed) / 2


def test_a_cut_keeps_every_case_and_marks_those_that_are_not_quick() -> None:
    parameters = cut(range(6), lambda case: case % 2 == 0)
    assert [parameter.values for parameter in parameters] == [(case,) for case in range(6)]
    marked = [[mark.name for mark in parameter.marks] for parameter in parameters]
    assert marked == [[], ["full"]] * 3


def test_ci_runs_both_cuts_and_together_they_are_all_tests() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (.+)$", ci, re.MULTILINE) == ["lint", "test", "test-full"]
    recipes = re.findall(r"^\t\$\(PYTEST\) -m '(.+?)'", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipes == ["not full", "full or hypothesis"]
