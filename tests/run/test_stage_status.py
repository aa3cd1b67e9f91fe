"""What `status` says of a run whose stages failed, wait for ever or have nothing that continues them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.in_process import answer
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import DataError, LaunchError
from btm_scale.launch import slurm_commands
from btm_scale.launch.shutdown import STOPPED
from btm_scale.launch.slurm_commands import QueueEntry
from btm_scale.launch.slurm_queue import Submissions, Submitted
from btm_scale.run import stage_status as stage_status_module
from btm_scale.run import status as status_module
from btm_scale.run.slurm_notes import slurm_notes
from btm_scale.run.stage_status import stage_status
from btm_scale.run.stages import as_stage
from btm_scale.run.state import open_run
from btm_scale.run.status import problems, run_status
from btm_scale.run_dir import RunDir
from btm_scale.util.rank_log import note_silent_failure

Queue = dict[str, tuple[str, QueueEntry]]


class Run:
    """A run of which only files exist, and what SLURM's queue holds."""

    def __init__(self, folder: Path) -> None:
        self.dir = RunDir(folder / "run")
        self.config: RunConfig = open_run(write_config(folder / "tiny.yaml", tiny_values(folder)), self.dir)
        self.queue: Queue = {}
        for folder_of in ("slurm", "train/seed", "train/score"):
            (self.dir.root / folder_of).mkdir(parents=True)

    def submit(self, job: str, number: str, *models: str, state: str = "", reason: str = "", log: str = "") -> None:
        places = {str(place): model for place, model in enumerate(models)} if len(models) > 1 else {}
        one = Submitted(job, number, places or ({"": models[0]} if models else {}), f"tiny.{job}")
        Submissions(self.dir.root / "slurm").note(one)
        for place in places or [""]:
            task = f"{number}_{place}" if place else number
            if state:
                self.queue[task] = (f"tiny.{job}", QueueEntry(task, state, reason, "", ""))
            if log:
                (self.dir.root / "slurm" / f"{job}-{task}.log").write_text(log)

    @property
    def problems(self) -> list[str]:
        slurm = slurm_notes(self.dir)
        rows = run_status(self.config, self.dir, slurm)
        return problems(rows, stage_status(self.config, self.dir, slurm), self.dir, slurm)

    @property
    def states(self) -> dict[str, str]:
        slurm = slurm_notes(self.dir)
        states = {one.name: str(one.state) for one in stage_status(self.config, self.dir, slurm)}
        return states | {row.model: str(row.state) for row in run_status(self.config, self.dir, slurm)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    monkeypatch.setattr(slurm_commands, "queue", lambda: made.queue)
    monkeypatch.setattr(slurm_commands, "is_here", lambda: True)
    return made


def test_a_prepare_that_failed_in_slurm_is_named_with_its_log(run: Run) -> None:
    run.submit("prepare", "3", log="INFO encoding\nbtm-scale: bad.jsonl, line 60: no JSON\n\n")
    run.submit("seed", "4", "seed")  # taken out of the queue with it
    assert (run.states["prepare"], run.states["seed"]) == ("failed", "waiting")
    assert run.problems == [
        f"prepare failed: btm-scale: bad.jsonl, line 60: no JSON ({run.dir.root}/slurm/prepare-3.log)"
    ]
    with pytest.raises(DataError), as_stage(run.dir, "prepare"):
        raise DataError("bad.jsonl is damaged")
    assert run.problems == [f"prepare failed: bad.jsonl is damaged ({run.dir.root}/slurm/prepare-3.log)"]
    run.submit("prepare", "5", state="PENDING", reason="Priority")
    assert run.problems == []
    assert run.states["prepare"] == "waiting"


def test_a_job_that_ended_before_its_ranks_started_has_failed(run: Run) -> None:
    run.submit("experts", "7", "python", "licences", log="module: command not found\n")
    assert run.states["python"] == "failed"
    assert run.problems[0] == (f"python failed: module: command not found ({run.dir.root}/slurm/experts-7_0.log)")


def test_a_job_that_no_end_of_others_starts_is_a_problem(run: Run) -> None:
    run.submit("prepare", "3", state="PENDING", reason="QOSMaxWallDurationPerJobLimit")
    assert run.problems == [
        "prepare waits in SLURM for QOSMaxWallDurationPerJobLimit, which does not change when other jobs end. Change "
        "launch.slurm, cancel the job, and rerun."
    ]


def test_a_group_that_was_stopped_is_not_one_that_failed(run: Run) -> None:
    note_silent_failure(run.dir.log("seed"), 2)
    assert run.states["seed"] == "failed"
    (run.dir.train("seed") / STOPPED).touch()
    assert run.states["seed"] == "stopped"
    assert [problem for problem in run.problems if "failed" in problem] == []


def test_a_controller_that_does_not_answer_is_a_problem_of_a_run_that_is_not_done(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Queue:
        raise LaunchError("squeue failed: timed out.")

    run.submit("prepare", "3")
    monkeypatch.setattr(slurm_commands, "queue", fails)
    assert run.problems == ["squeue failed: timed out."]


def test_check_exits_with_1_when_nothing_continues_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path)
    [problem] = run.problems
    assert problem.startswith("Nothing is running or queued, and seed, ")
    assert problem.endswith(" are not done. Run the same command again to resume.")
    assert answer("status", run.dir.root)["problems"] == [problem]
    with pytest.raises(AssertionError, match="exited with 1"):
        answer("status", run.dir.root, "--check")


def test_an_evaluation_that_failed_is_named_once_all_models_are_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.submit("evaluate", "9", log="srun: error: n1: task 0: Out Of Memory\n")
    assert run.states["evaluate"] == "waiting"  # the models have been changed since
    for module in (stage_status_module, status_module):
        monkeypatch.setattr(module, "is_done", lambda config, run, model: True)
    monkeypatch.setattr(stage_status_module, "is_prepared", lambda config, run: True)
    assert run.problems == [
        f"evaluate failed: srun: error: n1: task 0: Out Of Memory ({run.dir.root}/slurm/evaluate-9.log)"
    ]
    note_silent_failure(run.dir.log("score"), 2)
    assert run.problems[0].startswith("evaluate failed: exited, and no rank reported an error")
