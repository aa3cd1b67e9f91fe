"""Merge across MPI ranks: rank 0 plans and publishes, and every rank writes its own shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from btm_scale.checkpoint.merge.bar import Bar
from btm_scale.checkpoint.merge.workers import Output, merge_share
from btm_scale.errors import CheckpointError
from btm_scale.util.mpi import mpi_rank

Report = TypeVar("Report")


def world() -> Any:
    """Return `COMM_WORLD`. Raises `CheckpointError` without mpi4py, or if it was built for a different MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed and finds no libmpi
        raise CheckpointError(
            f"Merging across MPI ranks needs mpi4py and an MPI library ({str(error).splitlines()[0]}). Install "
            "btm-scale[mpi], or use --jobs on one host."
        ) from error
    ranks = MPI.COMM_WORLD
    started = mpi_rank()
    if started is not None and started.size not in (None, ranks.size):
        raise CheckpointError(
            f"The launcher started {started.size} ranks, but mpi4py sees {ranks.size}, so each would merge alone. Use "
            "the mpirun of the MPI that mpi4py was built for, or --jobs on one host."
        )
    return ranks


class Leader:
    """Rank 0's side. `finish` must be called after success and failure alike: it releases the other ranks."""

    def __init__(self, ranks: Any) -> None:
        self.ranks = ranks

    def share_out(self, outputs: Sequence[Output], chunk_bytes: int) -> None:
        """Merge all units together with the other ranks. Raises the first error of any rank."""
        self.ranks.bcast((outputs, chunk_bytes))
        errors = self.ranks.gather(_own_share(self.ranks, outputs, chunk_bytes))
        if failures := [error for error in errors if error]:
            raise CheckpointError(failures[0])

    def finish(self, report: Report | None) -> None:
        """Release the other ranks, with the report or None after a failure."""
        self.ranks.bcast(report)


def follow(ranks: Any) -> Any:
    """Merge this rank's units and return rank 0's report; the counterpart of `Leader` on the other ranks.

    Raises `CheckpointError` if the merge failed.
    """
    work = ranks.bcast(None)
    if isinstance(work, tuple):  # otherwise the report of a merge that had already finished
        ranks.gather(_own_share(ranks, *work))
        work = ranks.bcast(None)
    if work is None:
        raise CheckpointError("The merge failed on rank 0. See its error message.")
    return work


def _own_share(ranks: Any, outputs: Sequence[Output], chunk_bytes: int) -> str | None:
    """Merge this rank's units; an error is returned rather than raised, so that every rank reaches the end."""
    try:
        with Bar(outputs) as bar:
            merge_share(
                outputs,
                ranks.rank,
                ranks.size,
                chunk_bytes=chunk_bytes,
                bar=None if ranks.rank else bar,
            )
    except Exception as error:
        return f"rank {ranks.rank}: {error}"
    return None
