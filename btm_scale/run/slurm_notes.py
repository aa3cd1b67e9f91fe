"""What SLURM says about a run: its queued and running jobs, and the logs of those that have ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from btm_scale.errors import LaunchError
from btm_scale.launch import slurm_commands
from btm_scale.launch.slurm_commands import QueueEntry
from btm_scale.launch.slurm_queue import Submissions
from btm_scale.run_dir import RunDir

# The name of a job, and the model that it trains or, after `text/`, the domain that it prepares.
Key = tuple[str, str | None]


@dataclass(frozen=True)
class SlurmNotes:
    """The jobs of a run by name and model: those in the queue, and the log of the last one that started and ended.

    `problem`: why nothing is known of the queue.
    """

    live: Mapping[Key, QueueEntry] = field(default_factory=dict)
    logs: Mapping[Key, Path] = field(default_factory=dict)
    is_used: bool = False
    problem: str = ""

    def entry(self, job: str) -> QueueEntry | None:
        """Return the queue entry of a job that trains no model."""
        return self.live.get((job, None))

    def of_model(self, model: str) -> QueueEntry | None:
        """Return the queue entry of the job that trains a model, or prepares a domain."""
        return next((entry for (_, name), entry in self.live.items() if name == model), None)

    def log(self, job: str) -> Path | None:
        """Return the log of a job that trains no model and has ended."""
        return self.logs.get((job, None))

    def log_of_model(self, model: str) -> Path | None:
        """Return the log of the last job that trained a model, or prepared a domain, and has ended."""
        return next((path for (_, name), path in reversed(list(self.logs.items())) if name == model), None)


def is_running(entry: QueueEntry) -> bool:
    """Return whether a job has started."""
    return entry.state in ("RUNNING", "COMPLETING")


def slurm_notes(run: RunDir) -> SlurmNotes:
    """Return what is known of a run's SLURM jobs; empty for a run that has none."""
    submissions = Submissions(run.root / "slurm")
    submitted = submissions.read()
    if not submitted:
        return SlurmNotes()
    if not slurm_commands.is_here():
        return SlurmNotes(is_used=True, problem="SLURM is not installed here, so its queue is unknown.")
    try:
        live = submissions.live(slurm_commands.queue())
    except LaunchError as error:  # a controller that is temporarily down says nothing about the run
        return SlurmNotes(is_used=True, problem=str(error).replace("No job was submitted. ", ""))
    logs: dict[Key, Path] = {}
    for one in submitted:
        for place, model in one.models.items() or [("", None)]:
            logs.pop((one.job, model), None)  # the last submission counts, in the order of submissions
            path = run.root / "slurm" / f"{one.job}-{one.id}{'_' * bool(place)}{place}.log"
            if one.id and (one.job, model) not in live and path.is_file():
                logs[one.job, model] = path
    return SlurmNotes(live, logs, is_used=True)
