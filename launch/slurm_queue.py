"""Speaking to SLURM: submit scripts, and see what has become of them."""

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

# The reason of a job that waits for one that has failed: SLURM takes it out of the queue, but may need a minute.
_NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True)
class QueueEntry:
    """A job, or a task of an array, that is not over: `id` is `12` or `12_3`."""

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
    """One submission: the job's name in the run, SLURM's id of it, and the models by their place in the array."""

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
        """The submissions were all of the file at first."""
        return {"submissions": content} if isinstance(content, list) else content


class Submissions:
    """What has been submitted for one run: `slurm/jobs.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "jobs.json"

    def alone(self) -> AbstractContextManager[None]:
        """Keep a second submission of this run out until this one has been noted."""
        return alone(self._folder / "lock")

    def read(self) -> list[Submitted]:
        """All submissions, oldest first."""
        return list((_Jobs.find(self._path) or _Jobs()).submissions)

    def note(self, made: Submitted) -> None:
        """Note a submission: once without an id, before SLURM hears of it, and again with the one that it answers."""
        answered = [one for one in self.read() if one.id]
        _Jobs(submissions=(*answered, made)).save(self._path)

    def settle(self, queue: Mapping[str, tuple[str, QueueEntry]]) -> None:
        """Find the job of a submission whose answer was lost: sbatch may time out after SLURM has taken the job."""
        made = self.read()
        known = {one.id for one in made}
        for one in made:
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
        """What is still in the queue, by (job, model); the model is None for a job that trains none."""
        found: dict[tuple[str, str | None], QueueEntry] = {}
        for one in self.read():
            for place, model in one.models.items() or [("", None)]:
                name, entry = queue.get(f"{one.id}_{place}" if place else one.id, ("", None))
                # SLURM's ids begin anew when its state is lost; the name tells whether the job is ours.
                if entry is not None and name == one.slurm_name and entry.reason != _NEVER:
                    found[one.job, model] = entry
        return found


def is_here() -> bool:
    """Whether this machine can ask SLURM."""
    return shutil.which("squeue") is not None


def queue() -> dict[str, tuple[str, QueueEntry]]:
    """This user's jobs that are not over, by id, each with its name."""
    form = "%i|%T|%r|%N|%j|%o"
    # --all: a partition may be hidden. The user by number: a name would be that of the environment.
    text = _ask("squeue", "--noheader", "--array", "--all", f"--user={os.getuid()}", f"--format={form}")
    found = {}
    for line in text.splitlines():
        number, state, reason, nodes, name, script = line.split("|", 5)
        found[number] = (name, QueueEntry(number, state, reason, nodes, script))
    return found


def submit(script: Path, *, after: Sequence[str], tasks: Sequence[int] | None, limit: int | None) -> str:
    """Hand a script to sbatch; returns the job's id.

    It starts once the jobs `after` have succeeded, and never if one of them fails. `tasks` picks from its array.
    """
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    if after:
        command.append(f"--dependency=afterok:{':'.join(after)}")
    if tasks is not None:
        command.append(f"--array={','.join(map(str, tasks))}" + (f"%{limit}" if limit else ""))
    return _ask(*command, str(script)).strip().split(";")[0]


def cancel(number: str) -> None:
    """Take a job out of the queue."""
    _ask("scancel", number)


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on this machine; run this where SLURM is, or give --dry-run to write the scripts only"
        )
    # A rank's or an outer job's variables would be taken for this submission's own options, and a user's own view of
    # the queue would hide jobs.
    outer = ("SLURM_JOB", "SLURM_STEP", "SBATCH_", "SQUEUE_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(
            f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}\n"
            "Correct launch.slurm and start again; what has been submitted already is not submitted twice."
        )
    return done.stdout
