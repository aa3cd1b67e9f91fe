"""From what SLURM or mpirun tells a task to what torch.distributed wants to know."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from btm_scale.errors import LaunchError

_NOT_A_RENDEZVOUS = ("localhost", "127.0.0.1", "::1")


def become_slurm_rank(environment: MutableMapping[str, str]) -> None:
    """Put RANK, WORLD_SIZE and LOCAL_RANK into the environment of a task that srun started.

    Raises LaunchError if this is no such task, or where the ranks of several nodes would each wait at an own localhost.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise LaunchError(
            f"--launcher slurm is for tasks of a job, but {', '.join(missing)} is not set; "
            "submit the scripts that `btm-scale run CONFIG --launcher slurm` writes"
        )
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    if nodes > 1 and environment["MASTER_ADDR"] in _NOT_A_RENDEZVOUS:
        raise LaunchError(
            f"this group has {nodes} nodes, and MASTER_ADDR is {environment['MASTER_ADDR']}, another place on each; "
            "let it be the address of the job's first node, as in the script that btm-scale wrote"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = local_rank(environment, environment["SLURM_LOCALID"])


def local_rank(environment: Mapping[str, str], place: str) -> str:
    """LOCAL_RANK of a task at this place of its node. One that is bound to a single GPU sees it as its first."""
    bound = "CUDA_VISIBLE_DEVICES" in environment and "," not in environment["CUDA_VISIBLE_DEVICES"]
    return "0" if bound else place
