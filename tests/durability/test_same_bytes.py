"""Two executions of one command write the same bytes, although hashing differs between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.verb_cases import VERBS, Stages, files_of
from helpers.warm import Warm


@pytest.mark.full
def test_every_verb_writes_the_same_bytes_in_another_process(warm: Warm, stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    other = Warm(tmp_path / "warm", PYTHONHASHSEED="1")
    try:
        for verb in VERBS.values():
            run, words = stages.begin(verb, tmp_path)
            first, once = warm.check(*words), files_of(run)
            stages.begin(verb, tmp_path)
            second = other.check(*words)
            assert files_of(run) == once, verb.name
            if not verb.name.startswith("merge"):  # whose answer has the seconds that it took
                assert second.stdout == first.stdout
    finally:
        other.close()
