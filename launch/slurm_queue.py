"""The jobs of a run in SLURM: which were submitted, and which of them are queued."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from btm_scale.errors import LaunchError
from btm_scale.launch.slurm_commands import QueueEntry
from btm_scale.util.locks import alone
from btm_scale.util.records import Record

# The reason of a job that waits for a failed one; SLURM removes it from the queue after up to a minute.
_NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Submitted:
    """One submission: the name of the job in the run, its SLURM id, and the models by their index in the array."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    job: str
    id: str  # empty until SLURM has answered
    models: Mapping[str, str]
    slurm_name: str


class _Jobs(Record):
    """jobs.json: all submissions of a run, oldest first."""

    ERROR = LaunchError
    REMEDY = "Delete it once no job of this run is in the queue: squeue --me"

    submissions: tuple[Submitted, ...] = ()

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Convert the first version, which was a list of submissions."""
        return {"submissions": content} if isinstance(content, list) else content


class Submissions:
    """The submissions of a run: `slurm/jobs.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "jobs.json"

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which no other process submits this run."""
        return alone(self._folder / "lock")

    def read(self) -> list[Submitted]:
        """Return all submissions, oldest first."""
        return list((_Jobs.find(self._path) or _Jobs()).submissions)

    def note(self, submission: Submitted) -> None:
        """Record a submission: without an id before sbatch is called, and again with the id that it returns."""
        answered = [one for one in self.read() if one.id and one != submission]
        _Jobs(submissions=(*answered, submission)).save(self._path)

    def forget_unanswered(self) -> None:
        """Remove the record of a submission that SLURM has refused."""
        _Jobs(submissions=tuple(one for one in self.read() if one.id)).save(self._path)

    def settle(self, queue: Mapping[str, tuple[str, QueueEntry]]) -> None:
        """Find the job of a submission without an id: sbatch may time out after SLURM has accepted the job."""
        submissions = self.read()
        known = {one.id for one in submissions}
        for one in submissions:
            script = str(self._folder / f"{one.job}.sh")
            lost = [
                number.partition("_")[0]
                for number, (name, entry) in queue.items()
                if (name, entry.script) == (one.slurm_name, script)
            ]
            number = next((number for number in lost if number not in known), None)
            if not one.id and number is not None:
                self.note(replace(one, id=number))

    def live(self, queue: Mapping[str, tuple[str, QueueEntry]]) -> dict[tuple[str, str | None], QueueEntry]:
        """Return the queue entries of this run by (job, model); the model is None for a job that trains none."""
        entries: dict[tuple[str, str | None], QueueEntry] = {}
        for one in self.read():
            for place, model in one.models.items() or [("", None)]:
                name, entry = queue.get(f"{one.id}_{place}" if place else one.id, ("", None))
                # SLURM's ids restart when its database is lost; the name shows whether the job is ours.
                if entry is not None and name == one.slurm_name and entry.reason != _NEVER:
                    entries[one.job, model] = entry
        return entries
