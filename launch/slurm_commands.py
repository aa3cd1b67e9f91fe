"""SLURM's commands: read the queue as data, submit a script, and say what SLURM answered if it refuses."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.errors import LaunchError
from btm_scale.launch.slurm_environment import for_jobs

# SLURM's default; an array has tasks with numbers below this.
DEFAULT_MAX_ARRAY_SIZE = 1001
_ID = re.compile(r"(\d+)(;[\w.-]+)?")  # --parsable: the id, and the cluster if there are several
_LIMIT = re.compile(r"\b((?:QOS|Assoc)\w*Submit\w*)|job submit limit|temporarily unable to accept job", re.IGNORECASE)
_NO_SUCH_NODES = re.compile(
    r"node configuration is not available|Node count specification invalid|More processors requested"
    r"|Invalid generic resource|partition configuration not available",
    re.IGNORECASE,
)
# A controller that is restarted, or has too much to do.
_BUSY = re.compile(r"timed out|unable to contact|connect failure|zero bytes|try again", re.IGNORECASE)
_RETRIES = (2.0, 5.0, 10.0)  # seconds before each further try
_OTHER_LIMIT = re.compile(r"\b(?:QOS|Assoc)(?!\w*Submit)(?:Max|Min|Grp)\w+")
# Reasons with which a pending job waits for a change of the job or of the cluster, and not for other jobs to end.
_BLOCKED = re.compile(
    r"(QOS|Assoc)(Max|Min)\w*(PerJob|PerNode|Duration)\w*|(QOS|Assoc)Grp\w*(Minutes|Wall|Billing)\w*|QOSMinGRES"
    r"|QOSUsageThreshold|Partition(NodeLimit|TimeLimit|Down|Inactive|Config)|BadConstraints|Invalid(Account|QOS)"
    r"|Job(Held\w+)|\w*launch[ _]fail.*|AccountNotAllowed|QOSNotAllowed|ReqNodeNotAvail.*|ReservationDeleted|DeadLine"
)


class AtLimit(LaunchError):  # noqa: N818 (it names a state)
    """SLURM accepts no more jobs of this user for now: a limit of submitted jobs is reached.

    `is_named`: SLURM says which limit; otherwise, the job itself may be too large for one.
    """

    def __init__(self, message: str, *, is_named: bool) -> None:
        super().__init__(message)
        self.is_named = is_named


class SlurmBusy(LaunchError):  # noqa: N818 (it names a state)
    """SLURM's controller does not answer for now."""


@dataclass(frozen=True)
class QueueEntry:
    """A pending or running job, or task of an array: `id` is `12` or `12_3`."""

    id: str
    state: str
    reason: str
    nodes: str
    script: str

    @property
    def is_blocked(self) -> bool:
        """Whether the job cannot start although others end: it breaks a limit, is held, or its nodes are gone."""
        return self.state == "PENDING" and _BLOCKED.fullmatch(self.reason) is not None

    def __str__(self) -> str:
        where = f" on {self.nodes}" if self.nodes else f" ({self.reason})" if self.reason != "None" else ""
        return f"SLURM {self.id} {self.state.lower()}{where}"


def is_here() -> bool:
    """Return whether SLURM's commands are installed on this machine."""
    return shutil.which("squeue") is not None


def queue() -> dict[str, tuple[str, QueueEntry]]:
    """Return (name, entry) of this user's pending and running jobs, by id. Raises LaunchError if squeue fails."""
    # Names and arguments of jobs may have newlines and any separator, so each call has its own. `--json` needs plugins
    # that not every cluster has.
    mark = secrets.token_hex(8)
    form = f"<{mark}>" + f"<{mark[:8]}>".join(("%i", "%T", "%r", "%N", "%j", "%o"))
    # --all: a partition may be hidden. The user by number: a name would be that of the environment.
    words = ("squeue", "--noheader", "--array", "--all", f"--user={os.getuid()}", f"--format={form}")
    process = _call(*words)
    for seconds in _RETRIES:
        if not (process.returncode and _BUSY.search(process.stderr)):
            break
        time.sleep(seconds)
        process = _call(*words)
    if process.returncode:
        first, *_ = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()
        raise (SlurmBusy if _BUSY.search(process.stderr) else LaunchError)(
            f"squeue failed: {first.removeprefix('squeue: ')}. No job was submitted. Check that this host can reach "
            "SLURM (SLURM_CONF), or only write the scripts: --dry-run."
        )
    entries = {}
    for record in process.stdout.split(f"<{mark}>")[1:]:  # what comes before the first is a banner
        number, state, reason, nodes, name, script = record.removesuffix("\n").split(f"<{mark[:8]}>", 5)
        entries[number] = (name, QueueEntry(number, state, reason, nodes, script))
    return entries


def max_array_size() -> int:
    """Return the number below which the tasks of an array must be; SLURM's default if the cluster does not answer."""
    if shutil.which("scontrol") is None:
        return DEFAULT_MAX_ARRAY_SIZE
    answer = _call("scontrol", "show", "config")
    match = re.search(r"^\s*MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    return int(match[1]) if match and int(match[1]) > 0 else DEFAULT_MAX_ARRAY_SIZE


def submit(
    script: Path, *, after: Sequence[str], tasks: Sequence[int] | None, limit: int | None, beside: Sequence[str] = ()
) -> str | None:
    """Submit a script with sbatch; returns the id of the job, None if no line of the answer is one.

    It starts once the jobs `after` have succeeded, and never if one of them fails, and once those `beside` have ended.
    `tasks` selects tasks of its array, of which `limit` run at once.

    Raises AtLimit if SLURM accepts no more jobs for now, and LaunchError if it refuses this one.
    """
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    conditions = [f"afterok:{':'.join(after)}"] * bool(after) + [f"afterany:{':'.join(beside)}"] * bool(beside)
    if conditions:
        command.append(f"--dependency={','.join(conditions)}")
    if tasks is not None:
        command.append(f"--array={ranges(tasks)}" + (f"%{limit}" if limit else ""))
    process = _call(*command, str(script))
    if process.returncode:
        _refuse(command, process)
    numbers = {match[1] for line in process.stdout.splitlines() if (match := _ID.fullmatch(line.strip()))}
    return numbers.pop() if len(numbers) == 1 else None


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as SLURM writes them: `0-3,7`. A list of a thousand would be too long for its parser."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def cancel(number: str) -> None:
    """Cancel a job."""
    process = _call("scancel", number)
    if process.returncode:
        _refuse(["scancel", number], process)


def _refuse(command: Sequence[str], process: subprocess.CompletedProcess[str]) -> None:
    answer = process.stderr.strip() or process.stdout.strip() or f"exit code {process.returncode}"
    limit = _LIMIT.search(answer)
    if command[0] == "sbatch" and limit is not None and not _OTHER_LIMIT.search(answer):
        reason = answer.splitlines()[-1].removeprefix("sbatch: error: ").removeprefix("Batch job submission failed: ")
        raise AtLimit(limit[1] or reason, is_named=bool(limit[1]))
    nodes = _kinds_of_nodes() if _NO_SUCH_NODES.search(answer) else ""
    raise LaunchError(
        f"{' '.join(command)}: {answer}\n{nodes}"
        "Correct launch.slurm and rerun; jobs that are already submitted are not submitted again."
    )


def _kinds_of_nodes() -> str:
    """Return a sentence on how many nodes of each kind every partition has; "" if SLURM does not answer."""
    if shutil.which("sinfo") is None:
        return ""
    form = "%R|%D|%G|%c"
    rows = [line.split("|") for line in _call("sinfo", "--noheader", f"--format={form}").stdout.splitlines()]
    kinds = [
        f"{partition}: {count} with {'no GPU' if gres == '(null)' else gres} and {cores} cores"
        for partition, count, gres, cores in (row for row in rows if len(row) == 4)
    ]
    return f"The nodes of this cluster are {'; '.join(kinds)}. All nodes of a job must be alike.\n" if kinds else ""


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not installed. Run this on a machine with SLURM, or only write the scripts: --dry-run."
        )
    return subprocess.run(
        command,
        env=for_jobs(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # a job may be named in another encoding
        check=False,
    )
