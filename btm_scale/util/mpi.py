"""Detects MPI ranks by the environment variables that each MPI launcher sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# (rank, size). The launchers of MPI libraries come before resource managers: a rank of an mpirun that was called in a
# step of srun has the variables of both, and only those of mpirun are right.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
    ("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE"),  # MVAPICH 3
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, srun --mpi=pmi2
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),  # srun --mpi=pmix; PMIx itself sets no size
    ("PMIX_RANK", None),  # prun, and other servers of PMIx
)
_PREFIXES = ("PMI", "OMPI_", "MPI_", "MPIR_", "MPIEXEC_", "HYD", "PRTE_", "I_MPI_", "MV2_", "MVP_")


@dataclass(frozen=True)
class MpiRank:
    """A rank of MPI, and the number of ranks; None if the launcher does not set it."""

    rank: int
    size: int | None

    @property
    def is_one_of_several(self) -> bool:
        """Whether there are other ranks. An unknown number of ranks counts as several."""
        return self.size is None or self.size > 1


def mpi_rank(environment: Mapping[str, str] = os.environ) -> MpiRank | None:
    """Return the MPI rank of this process; None if no MPI launcher started it."""
    for rank, size in _LAUNCHERS:
        if rank in environment and (size is None or size in environment):
            return MpiRank(int(environment[rank]), None if size is None else int(environment[size]))
    return None


def without_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of MPI, so that a child process is not an MPI rank."""
    return {name: value for name, value in environment.items() if not name.startswith(_PREFIXES)}
