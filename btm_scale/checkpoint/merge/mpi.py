"""A merge by the ranks of `mpirun`: the first plans and publishes, each writes shards of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from btm_scale.checkpoint.merge.workers import Output, merge_share
from btm_scale.errors import CheckpointError

Report = TypeVar("Report")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of Open MPI and of MPICH
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")


def started_by_mpi() -> bool:
    """Whether `mpirun` started this process as one of several."""
    return any(int(os.environ.get(name, "1")) > 1 for name in _SIZES)


def follows() -> bool:
    """Whether this process is one of `mpirun`'s, and not the first."""
    return any(int(os.environ.get(name, "0")) > 0 for name in _RANKS)


def world() -> Any:
    """All ranks; raises `CheckpointError` without mpi4py."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise CheckpointError(
            "mpirun needs mpi4py, which is not installed. Install btm-scale[mpi], or use --jobs on one host."
        ) from error
    return MPI.COMM_WORLD


class Leader:
    """The first rank's side. The others learn of the end by `finish`, whether it is a success or not."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks

    def share_out(self, outputs: Sequence[Output], chunk_bytes: int) -> None:
        """Do the units of plans together; raises the first error of any rank."""
        self.ranks.bcast((outputs, chunk_bytes))
        errors = self.ranks.gather(_own_share(self.ranks, outputs, chunk_bytes))
        if told := [error for error in errors if error]:
            raise CheckpointError(told[0])

    def finish(self, report: Report | None) -> None:
        """Let the other ranks go, with the report or without one."""
        self.ranks.bcast(report)


def follow(ranks: Any) -> Any:
    """The other ranks' side: returns the first rank's report."""
    work = ranks.bcast(None)
    if work is not None:
        ranks.gather(_own_share(ranks, *work))
        work = ranks.bcast(None)
    if work is None:
        raise CheckpointError("the merge was stopped; its first process says why.")
    return work


def _own_share(ranks: Any, outputs: Sequence[Output], chunk_bytes: int) -> str | None:
    """This rank's part; an error is returned, so that every rank reaches the end."""
    try:
        merge_share(outputs, ranks.rank, ranks.size, chunk_bytes=chunk_bytes, by_shard=True)
    except Exception as error:
        return f"rank {ranks.rank}: {error}"
    return None
