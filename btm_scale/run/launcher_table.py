"""Every launcher in one table: its name, its help text and what it does.

Parsing the command line reads this file, so it imports a launcher's module only when that launcher is used.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btm_scale.config.launch import LaunchConfig
    from btm_scale.config.run import RunConfig
    from btm_scale.launch.supervise import RunGroups
    from btm_scale.run_dir import RunDir

LOCAL = "local"


@dataclass(frozen=True)
class Launcher:
    """A way to start the groups of a stage.

    `groups` gives what starts groups, from the section `launch`; without it they start on this machine. The others
    are for launchers that differ from that: `submit` takes the place of all stages in `run`, `train` of the stage in
    `train`, and `become_rank` puts RANK, WORLD_SIZE and LOCAL_RANK into the environment of a process that is a rank.
    """

    help: str
    groups: Callable[[LaunchConfig], RunGroups] | None = None
    submit: Callable[..., dict[str, Any]] | None = None
    train: Callable[[RunConfig, RunDir, Sequence[str]], None] | None = None
    become_rank: Callable[[MutableMapping[str, str]], None] | None = None


def _on_hosts(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.deepspeed import HostPool
    from btm_scale.launch.supervise import groups_in

    return groups_in(HostPool(config.deepspeed))


def _by_srun(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.slurm import SrunPool
    from btm_scale.launch.supervise import groups_in

    return groups_in(SrunPool(config.slurm))


def _submit_to_slurm(config: RunConfig, run: RunDir, *, dry_run: bool) -> dict[str, Any]:
    from btm_scale.run.slurm import submit_run

    return submit_run(config, run, dry_run=dry_run)


def _become_slurm_rank(environment: MutableMapping[str, str]) -> None:
    from btm_scale.launch.slurm import become_slurm_rank

    become_slurm_rank(environment)


def _by_mpirun(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.mpi import MpiLauncher

    return MpiLauncher(config.mpi)


def _train_under_mpi(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    from btm_scale.run.launchers import train_under_mpi

    train_under_mpi(config, run, models)


LAUNCHERS = {
    LOCAL: Launcher("this machine"),
    "deepspeed": Launcher("hosts of a hostfile", _on_hosts),
    "slurm": Launcher("a SLURM cluster", _by_srun, submit=_submit_to_slurm, become_rank=_become_slurm_rank),
    "mpi": Launcher("ranks of mpirun", _by_mpirun, train=_train_under_mpi),
}
