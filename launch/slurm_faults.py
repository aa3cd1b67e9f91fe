"""Nodes of a SLURM cluster that fail groups: each fault is recorded in the run, and bad nodes are excluded.

A rank records an error that only its own host can cause; the script of a requeued job records that a node was lost
(templates/faults.sh). Two faults make a node bad.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from btm_scale.errors import LaunchError, NoUsableGpuError
from btm_scale.launch.slurm_environment import for_jobs
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.records import Record

logger = logging.getLogger(__name__)

_BAD_AT = 2  # faults
_NODES_PER_EXCLUDED = 4  # at most one of this many nodes is excluded
_LONGEST_REASON = 200  # characters
# Errors of CUDA, HIP, NVML and NCCL that name hardware or driver of this host, and no mistake of a program.
_OF_THE_HOST = re.compile(
    r"uncorrectable (NVLink|ECC)|\bECC error|fallen off the bus|GPU is lost|device is lost|GPU requires reset"
    r"|no (CUDA|HIP|ROCm)-capable device|(CUDA|HIP) (driver initialization failed|unknown error)"
    r"|(CUDA|HIP) error: (unknown error|initialization error|system has unsupported)|system not yet initialized"
    r"|is/are busy or unavailable|NVML: |driver/library version mismatch|unhandled (cuda|hip) error"
    r"|unhandled system error|ncclSystemError|hardware stack error|MMU fault|Bus error",
    re.IGNORECASE,
)
# With these, the other end may be at fault.
_OF_A_PEER = re.compile(r"remote|closed by peer|reset by peer|connection (refused|closed)|connect to", re.IGNORECASE)
_NODE = re.compile(r"[\w.-]+")


class NodeFault(Record):
    """slurm/faults/NODE/JOB-RESTART.json: why a node failed a group in one start of a job."""

    ERROR = LaunchError
    REMEDY = "Delete it: this fault is then no longer counted."

    reason: str


@dataclass(frozen=True)
class BadNode:
    """A node that has failed groups, with the number of its faults and the reason of the last."""

    name: str
    faults: int
    reason: str

    @property
    def is_bad(self) -> bool:
        """Whether it has failed often enough to be excluded."""
        return self.faults >= _BAD_AT

    def __str__(self) -> str:
        return f"{self.name} failed {self.faults} group{'s' * (self.faults > 1)} (last: {self.reason})"


def is_of_the_host(error: BaseException) -> bool:
    """Return whether an error is one of this host's hardware or driver, which another host would not have."""
    if isinstance(error, NoUsableGpuError):
        return True
    return _OF_THE_HOST.search(str(error)) is not None and _OF_A_PEER.search(str(error)) is None


@contextlib.contextmanager
def noting_faults(run: RunDir, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """If the block raises an error of this host in a job of SLURM, record the fault of its node."""
    try:
        yield
    except Exception as error:
        job, node = environment.get("SLURM_JOB_ID"), environment.get("SLURMD_NODENAME", "")
        if job and _NODE.fullmatch(node) and is_of_the_host(error):
            path = _folder(run) / node / f"{job}-{environment.get('SLURM_RESTART_COUNT', '0')}.json"
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            with contextlib.suppress(OSError):  # the disk may be what failed
                make_directory(path.parent)
                NodeFault(reason=first[:_LONGEST_REASON]).save(path)
        raise


def faulty_nodes(run: RunDir) -> list[BadNode]:
    """Return the nodes that have failed groups, those with the most faults first."""
    nodes = []
    for folder in _folder(run).glob("*/"):
        records = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        if records and _NODE.fullmatch(folder.name):
            nodes.append(BadNode(folder.name, len(records), _reason(records[-1])))
    return sorted(nodes, key=lambda node: (-node.faults, node.name))


def nodes_to_exclude(run: RunDir, most: int, partition: str | None, needed: int) -> tuple[list[BadNode], int]:
    """Return the bad nodes to exclude, and how many more may be excluded by requeued jobs.

    These are at most `most` together, at most a quarter of the partition, and leave the nodes that the largest job
    `needed`. Logs which bad nodes are excluded, and which are not because of this limit.
    """
    nodes = _nodes_of(partition) if most else 0
    limit = most if nodes is None else max(0, min(most, nodes // _NODES_PER_EXCLUDED, nodes - needed))
    bad = [node for node in faulty_nodes(run) if node.is_bad] if most else []
    for node in bad[:limit]:
        logger.warning("new jobs exclude %s. Delete %s to use it again", node, _folder(run) / node.name)
    if len(bad) > limit:
        logger.warning(
            "%s failed groups at least twice too, and only %d of %s nodes may be excluded (launch.slurm.max_excluded, "
            "at most a quarter of them): check whether the config or the environment is what fails there",
            ", ".join(node.name for node in bad[limit:]),
            limit,
            "the" if nodes is None else nodes,
        )
    return bad[:limit], max(0, limit - len(bad))


def _folder(run: RunDir) -> Path:
    return run.root / "slurm" / "faults"


def _reason(path: Path) -> str:
    try:
        return NodeFault.load(path).reason
    except LaunchError:  # half written by a script whose node was lost
        return "no reason is recorded"


def _nodes_of(partition: str | None) -> int | None:
    """Return the number of nodes of a partition, or of the default one; None if SLURM does not answer."""
    if shutil.which("sinfo") is None:
        return None
    words = ["sinfo", "--noheader", "--Node", "--format=%N %P", *([f"--partition={partition}"] if partition else [])]
    answer = subprocess.run(words, env=for_jobs(os.environ), capture_output=True, text=True, check=False)
    rows = [line.split() for line in answer.stdout.splitlines()]
    nodes = {row[0] for row in rows if len(row) == 2 and (partition or row[1].endswith("*"))}
    return len(nodes) or None
