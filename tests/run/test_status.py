from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.run.state import open_run
from btm_scale.run.status import failures, run_status
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import ModelLock
from btm_scale.util.rank_log import note_silent_failure


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with one step of its seed model trained."""
    run = RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path)), run)
    run.metrics("seed").parent.mkdir(parents=True)
    run.metrics("seed").write_text('{"step": 1, "loss": 5.0}\n')
    return run


def _state(run: RunDir, tmp_path: Path, model: str = "seed") -> str:
    config = write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path))
    return next(row.state for row in run_status(config, run) if row.model == model)


def test_a_model_whose_training_was_interrupted_is_stopped_and_one_that_has_not_begun_is_waiting(
    run: RunDir, tmp_path: Path
) -> None:
    assert _state(run, tmp_path) == "stopped"
    assert _state(run, tmp_path, "python") == "waiting"
    with ModelLock(run.train("seed")):
        assert _state(run, tmp_path) == "running"


def test_a_model_whose_group_failed_is_failed(run: RunDir, tmp_path: Path) -> None:
    note_silent_failure(run.log("seed"), 1)
    assert _state(run, tmp_path) == "failed"
    config = write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path))
    assert list(failures(run_status(config, run), run)) == ["seed"]


def test_threads_that_wait_for_a_core_are_a_note_of_the_model(run: RunDir, tmp_path: Path) -> None:
    run.metrics("seed").write_text('{"step": 1, "loss": 5.0, "core_wait": 0.52}\n')
    config = write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path))
    with ModelLock(run.train("seed")):
        [note] = [row.note for row in run_status(config, run) if row.model == "seed"]
    assert note == "threads wait for a core 52% of the time: other work uses the same cores"
