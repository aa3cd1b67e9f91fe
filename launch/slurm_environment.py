"""The environment that a job of SLURM starts with: the user's, without what an outer job or another launcher left."""

from __future__ import annotations

from collections.abc import Mapping

from btm_scale.launch.ranks import without_rank
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.util.mpi import without_mpi

# How to reach SLURM; its other variables are those of an outer job, or options that the user set for other jobs.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SCANCEL_")
# SLURM sets these for a job with GPUs. Those of an outer job hide the GPUs of a job on nodes without gres.
_OF_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def for_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for SLURM's commands, and so for the jobs that sbatch submits.

    In an outer job, srun exports how it bound the calling task (SLURM_CPU_BIND), and what the outer job asked for:
    srun in the new job would read all of it as options.
    """
    in_a_job = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in without_mpi(without_rank(environment)).items()
        if name in _KEPT or not (name.startswith(_OF_SLURM) or name == SUPERVISOR or (in_a_job and name in _OF_GPUS))
    }


def for_steps(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for srun in the current job, without what an outer step left."""
    left = ("SLURM_CPU_BIND", "SLURM_MEM_BIND", "SLURM_STEP", "SLURM_EXPORT_ENV", "SLURM_GTIDS", "SLURM_DISTRIBUTION")
    kept = {name: value for name, value in without_rank(environment).items() if not name.startswith(left)}
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASK_PID"):
        kept.pop(name, None)
    return kept
