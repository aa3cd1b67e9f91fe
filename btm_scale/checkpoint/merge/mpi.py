"""A merge by the ranks of `mpirun`: the first plans and publishes, each writes shards of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from btm_scale.checkpoint.merge.workers import Output, merge_share
from btm_scale.errors import CheckpointError
from btm_scale.util.mpi import mpi_rank

Report = TypeVar("Report")


def world() -> Any:
    """Return all ranks. Raises `CheckpointError` without mpi4py, or with one that was built for another MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed and finds no libmpi
        raise CheckpointError(
            f"A merge by several MPI ranks needs mpi4py and an MPI ({str(error).splitlines()[0]}). Install "
            "btm-scale[mpi], or use --jobs on one host."
        ) from error
    ranks = MPI.COMM_WORLD
    started = mpi_rank()
    if started is not None and started.size not in (None, ranks.size):
        raise CheckpointError(
            f"The launcher started {started.size} ranks, and mpi4py sees {ranks.size}. Each of them would merge alone. "
            "Start them with the mpirun of the MPI that mpi4py was built for, or use --jobs on one host."
        )
    return ranks


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
