"""Requests to stop that reach the scripts of jobs, and the job that evaluates when its time is over."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fake_slurm import run_job


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("job", ["prepare", "seed", "evaluate"])
def test_a_script_that_gets_the_signal_waits_for_its_step_and_requeues_the_job(job: str, tmp_path: Path) -> None:
    """`scancel --full` signals the script, and srun forwards the signal to its step."""
    srun = "#!/bin/bash\nkill -USR1 $PPID\nsleep 0.2\necho over >> steps\nexit 85\n"
    run_job(tmp_path, srun, job)
    assert (tmp_path / "steps").read_text() == "over\n"
    assert asked(tmp_path) == ["requeue 7"]


@pytest.mark.parametrize("job", ["prepare", "seed", "evaluate"])
def test_a_script_that_gets_the_signal_before_its_step_does_not_start_it(job: str, tmp_path: Path) -> None:
    run_job(tmp_path, "#!/bin/bash\ntouch started\n", job, slurm={"setup": ["kill -USR1 $$"]})
    assert not (tmp_path / "started").exists()
    assert asked(tmp_path) == ["requeue 7"]


def test_a_group_that_was_asked_to_stop_while_it_starts_is_requeued_a_few_times(tmp_path: Path) -> None:
    """It has saved nothing: with a time limit shorter than its start, it would be requeued for ever."""
    for _ in range(4):
        assert run_job(tmp_path, "#!/bin/bash\nexit 85\n").returncode == 85
    assert asked(tmp_path) == ["requeue 7"] * 3


def test_an_evaluation_whose_time_is_over_scores_the_rest_in_a_requeued_job(tmp_path: Path) -> None:
    def evaluate(srun: str) -> int:
        in_container = {"container": "pytorch.sqsh"}  # where srun starts every command
        return run_job(tmp_path, f"#!/bin/bash\n{srun}\n", "evaluate", slurm=in_container).returncode

    # Of the ranks of a step, srun returns the highest code: that of one which was ended after the first had left.
    stopped = "mkdir -p made/train/score; touch made/train/score/stopped; exit 143"
    assert [evaluate(stopped) for _ in range(4)] == [0, 0, 0, 143]
    assert evaluate(f"mkdir -p made/scores/seed; touch made/scores/seed/law.test.safetensors; {stopped}") == 0
    assert evaluate("exit 1") == 1  # a failure is not a stop
    assert asked(tmp_path) == ["requeue 7"] * 4
    assert evaluate('echo "$*" >> steps') == 0
    verbs = [line.partition(" btm_scale.cli ")[2].split()[0] for line in (tmp_path / "steps").read_text().splitlines()]
    assert verbs == ["score", "evaluate", "report"]
    assert not (tmp_path / "made" / "slurm" / "evaluate.tries").exists()
