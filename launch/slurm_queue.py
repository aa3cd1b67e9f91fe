"""SLURM's queue: submit scripts, and find their jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from btm_scale.errors import LaunchError
from btm_scale.util.locks import alone
from btm_scale.util.records import Record

# The reason of a job that waits for a failed one; SLURM removes it from the queue after up to a minute.
_NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class QueueEntry:
    """A pending or running job, or task of an array: `id` is `12` or `12_3`."""

    id: str
    state: str
    reason: str
    nodes: str
    script: str

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason != "None" else ""
        return f"SLURM {self.id} {self.state.lower()}{where}"


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
        answered = [one for one in self.read() if one.id]
        _Jobs(submissions=(*answered, submission)).save(self._path)

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


def is_here() -> bool:
    """Return whether SLURM's commands are installed on this machine."""
    return shutil.which("squeue") is not None


def queue() -> dict[str, tuple[str, QueueEntry]]:
    """Return (name, entry) of this user's pending and running jobs, by id. Raises LaunchError if squeue fails."""
    form = "%i|%T|%r|%N|%j|%o"
    # --all: a partition may be hidden. The user by number: a name would be that of the environment.
    process = _call("squeue", "--noheader", "--array", "--all", f"--user={os.getuid()}", f"--format={form}")
    if process.returncode:
        first, *_ = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()
        raise LaunchError(
            f"squeue failed: {first.removeprefix('squeue: ')}. No job was submitted. Check that this host can reach "
            "SLURM (SLURM_CONF), or only write the scripts: --dry-run."
        )
    entries = {}
    for line in process.stdout.splitlines():
        number, state, reason, nodes, name, script = line.split("|", 5)
        entries[number] = (name, QueueEntry(number, state, reason, nodes, script))
    return entries


def submit(script: Path, *, after: Sequence[str], tasks: Sequence[int] | None, limit: int | None) -> str:
    """Submit a script with sbatch; returns the id of the job.

    It starts once the jobs `after` have succeeded, and never if one of them fails. `tasks` selects tasks of its array.
    """
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    if after:
        command.append(f"--dependency=afterok:{':'.join(after)}")
    if tasks is not None:
        command.append(f"--array={','.join(map(str, tasks))}" + (f"%{limit}" if limit else ""))
    return _ask(*command, str(script)).strip().split(";")[0]


def cancel(number: str) -> None:
    """Cancel a job."""
    _ask("scancel", number)


def _ask(*command: str) -> str:
    process = _call(*command)
    if process.returncode:
        raise LaunchError(
            f"{' '.join(command)}: {process.stderr.strip() or f'exit code {process.returncode}'}\n"
            "Correct launch.slurm and rerun; jobs that are already submitted are not submitted again."
        )
    return process.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not installed. Run this on a machine with SLURM, or only write the scripts: --dry-run."
        )
    # Variables of a rank or an outer job would act as options of this submission, and SQUEUE_ variables could hide
    # jobs.
    outer = ("SLURM_JOB", "SLURM_STEP", "SBATCH_", "SQUEUE_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
