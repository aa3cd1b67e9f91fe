"""Thousands of damaged and hostile files: each is read correctly or refused with a message, without side effects."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from helpers.shared_folder import shared_folder

from fuzz.corpus import make_corpus
from fuzz.runner import Outcome, check_corpus, run_input
from fuzz.targets import FOREIGN, FOREIGN_SEEDS, TARGETS

QUICK, FULL = range(500), range(500, 10_500)
PARTS = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shared_folder(tmp_path_factory, "fuzz-corpus", make_corpus)
    check_corpus(folder)
    return folder


def require_no_failures(outcomes: list[Outcome]) -> None:
    failures = [str(outcome) for outcome in outcomes if outcome.failed]
    assert not failures, f"{len(failures)} of {len(outcomes)} inputs:\n" + "\n\n".join(failures[:20])


def test_damaged_files_are_read_as_other_libraries_read_them_or_refused(corpus: Path) -> None:
    outcomes = [run_input(corpus, seed) for seed in QUICK]
    require_no_failures(outcomes)
    # The mutations neither destroy everything nor change nothing, and reach every kind.
    assert {outcome.kind for outcome in outcomes} == {target.kind for target in TARGETS}
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    assert min(verdicts["accepted"], verdicts["refused"]) > len(QUICK) / 10


def test_damaged_checkpoints_of_other_programs_are_read_as_others_read_them_or_refused(corpus: Path) -> None:
    outcomes = [run_input(corpus, seed) for seed in range(FOREIGN_SEEDS, FOREIGN_SEEDS + 60)]
    require_no_failures(outcomes)
    assert {outcome.kind for outcome in outcomes} == {target.kind for target in FOREIGN}


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_damaged_files_are_read_as_other_libraries_read_them_or_refused(corpus: Path, part: int) -> None:
    require_no_failures([run_input(corpus, seed) for seed in FULL[part::PARTS]])
