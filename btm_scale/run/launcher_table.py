"""Every launcher in one table: its name, its help text and its functions.

Parsing the command line imports this file, so a launcher's module is imported only when that launcher is used.
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

    `groups` returns the function that starts groups, from the section `launch`; without it, they start on this machine.
    The other fields override parts of a command: `submit` replaces all stages of `run`, `train` the stage of `train`,
    and `become_rank` sets RANK, WORLD_SIZE and LOCAL_RANK in the environment of a rank.
    """

    help: str
    groups: Callable[[LaunchConfig], RunGroups] | None = None
    submit: Callable[..., dict[str, Any]] | None = None
    train: Callable[[RunConfig, RunDir, Sequence[str]], None] | None = None
    become_rank: Callable[[MutableMapping[str, str]], None] | None = None


def _on_hosts(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.deepspeed import HostPool
    from btm_scale.launch.supervise import groups_in

    return groups_in(HostPool(config.deepspeed, config.device))


def _by_srun(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.slurm import SrunPool
    from btm_scale.launch.supervise import groups_in

    return groups_in(SrunPool(config.slurm))


def _submit_to_slurm(
    config: RunConfig, run: RunDir, *, dry_run: bool, reread: Callable[[], RunConfig] | None
) -> dict[str, Any]:
    from btm_scale.run.slurm import submit_run

    return submit_run(config, run, dry_run=dry_run, reread=reread)


def _become_slurm_rank(environment: MutableMapping[str, str]) -> None:
    from btm_scale.launch.slurm import become_slurm_rank

    become_slurm_rank(environment)


def _by_mpirun(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.mpi import MpiLauncher

    return MpiLauncher(config.mpi, config.device)


def _train_under_mpi(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    from btm_scale.run.launchers import train_under_mpi

    train_under_mpi(config, run, models)


LAUNCHERS = {
    LOCAL: Launcher("this machine"),
    "deepspeed": Launcher("hosts of a hostfile", _on_hosts),
    "slurm": Launcher("a SLURM cluster", _by_srun, submit=_submit_to_slurm, become_rank=_become_slurm_rank),
    "mpi": Launcher("ranks of mpirun", _by_mpirun, train=_train_under_mpi),
}
