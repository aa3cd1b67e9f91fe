"""Ranks of MPI, by the variables that their launchers really set."""

from __future__ import annotations

import pytest

from btm_scale.util.mpi import MpiRank, mpi_rank, without_mpi

STARTED = {
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "7"},
    "Intel MPI": {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "I_MPI_MPIRUN": "mpirun"},
    "MVAPICH2": {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"},
    "srun --mpi=pmi2": {"PMI_RANK": "1", "PMI_SIZE": "4", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
    "srun --mpi=pmix": {"PMIX_RANK": "1", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"},
    "mpirun inside a step of srun": {
        **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        **{"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"},
    },
}


@pytest.mark.parametrize("environment", STARTED.values(), ids=STARTED)
def test_ranks_of_each_launcher_are_detected(environment: dict[str, str]) -> None:
    assert mpi_rank(environment) == MpiRank(1, 4)
    assert MpiRank(1, 4).is_one_of_several


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, {"RANK": "1", "WORLD_SIZE": "4"}],
    ids=["a shell", "srun --mpi=none", "torchrun"],
)
def test_a_process_that_mpi_did_not_start_is_not_a_rank(environment: dict[str, str]) -> None:
    assert mpi_rank(environment) is None


def test_one_rank_alone_is_not_one_of_several_and_an_unknown_number_is() -> None:
    alone = mpi_rank({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert alone is not None
    assert not alone.is_one_of_several
    unknown = mpi_rank({"PMIX_RANK": "0"})
    assert unknown == MpiRank(0, None)
    assert unknown.is_one_of_several


@pytest.mark.parametrize("environment", STARTED.values(), ids=STARTED)
def test_a_child_without_the_variables_of_mpi_is_not_a_rank(environment: dict[str, str]) -> None:
    child = without_mpi(environment | {"PATH": "/bin"})
    assert mpi_rank(child) is None
    assert child["PATH"] == "/bin"
