"""Thousands of damaged and hostile files: each is read correctly or refused with a message, without side effects."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.shared_folder import shared_folder
from helpers.worlds import run_script

from fuzz.corpus import make_corpus
from fuzz.runner import Outcome
from fuzz.targets import FOREIGN, FOREIGN_SEEDS, TARGETS

QUICK, FULL = range(500), range(500, 10_500)
PARTS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "fuzz-corpus", make_corpus)


def outcomes_of(corpus: Path, seeds: Sequence[int], folder: Path) -> list[Outcome]:
    spec = {"corpus": str(corpus), "seeds": list(seeds), "outcomes": str(folder / "outcomes.json")}
    run_script(Path(__file__).with_name("inputs.py"), spec, folder)
    outcomes = [Outcome(**outcome) for outcome in json.loads((folder / "outcomes.json").read_text())]
    assert [outcome.seed for outcome in outcomes] == list(seeds)
    return outcomes


def require_no_failures(outcomes: list[Outcome]) -> None:
    failures = [str(outcome) for outcome in outcomes if outcome.failed]
    assert not failures, f"{len(failures)} of {len(outcomes)} inputs:\n" + "\n\n".join(failures[:20])


def test_damaged_files_are_read_as_other_libraries_read_them_or_refused(corpus: Path, tmp_path: Path) -> None:
    outcomes = outcomes_of(corpus, QUICK, tmp_path)
    require_no_failures(outcomes)
    # The mutations neither destroy everything nor change nothing, and reach every kind.
    assert {outcome.kind for outcome in outcomes} == {target.kind for target in TARGETS}
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    assert min(verdicts["accepted"], verdicts["refused"]) > len(QUICK) / 10


def test_damaged_checkpoints_of_other_programs_are_read_as_others_read_them_or_refused(
    corpus: Path, tmp_path: Path
) -> None:
    outcomes = outcomes_of(corpus, range(FOREIGN_SEEDS, FOREIGN_SEEDS + 60), tmp_path)
    require_no_failures(outcomes)
    assert {outcome.kind for outcome in outcomes} == {target.kind for target in FOREIGN}


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_damaged_files_are_read_as_other_libraries_read_them_or_refused(
    corpus: Path, part: int, tmp_path: Path
) -> None:
    require_no_failures(outcomes_of(corpus, FULL[part::PARTS], tmp_path))
