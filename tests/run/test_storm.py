"""Many processes add, remove, branch, score, evaluate and report on one run at the same time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cuts import full
from helpers.worlds import run_script


@pytest.mark.parametrize(("processes", "seconds"), [(4, 10), full(10, 120)])
def test_concurrent_commands_leave_what_one_process_would_leave(processes: int, seconds: int, tmp_path: Path) -> None:
    """No command ends with a traceback, every refusal is a sentence, and no update is lost: repeated by one process in
    the order in which they were committed, the commands give the same run, and every evaluation that one of its states
    has."""
    outcome = tmp_path / "outcome.json"
    spec = {"folder": str(tmp_path), "processes": processes, "seconds": seconds, "outcome": str(outcome)}
    run_script(Path(__file__).with_name("storm.py"), spec, tmp_path)
    done = json.loads(outcome.read_text())
    verbs = {words.rpartition(" ")[0] for words in done["calls"]}
    assert {"forest add", "forest remove", "branch", "score", "evaluate", "report"} <= verbs
    assert done["commits"] >= processes
    assert processes < 10 or done["states"] > 1
