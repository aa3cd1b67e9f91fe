"""Every launcher in one table: its name, its help text and its functions.

Parsing the command line imports this file, so a launcher's module is imported only when that launcher is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
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
    and `become_rank` sets RANK, WORLD_SIZE and LOCAL_RANK in the environment of a rank. `require` raises LaunchError if
    a config can never run there, for a dry run. `starts` is false if another program starts the ranks.
    """

    help: str
    groups: Callable[[LaunchConfig], RunGroups] | None = None
    submit: Callable[..., dict[str, Any]] | None = None
    train: Callable[[RunConfig, RunDir, Sequence[str]], None] | None = None
    become_rank: Callable[[MutableMapping[str, str]], None] | None = None
    require: Callable[[RunConfig], None] | None = None
    starts: bool = True


def _on_hosts(config: LaunchConfig) -> RunGroups:
    from btm_scale.launch.deepspeed import HostPool
    from btm_scale.launch.supervise import groups_in

    return groups_in(HostPool(config.deepspeed, config.device))


def _require_hosts(config: RunConfig) -> None:
    from btm_scale.launch.deepspeed import HostPool
    from btm_scale.train.jobs import model_names, training_job

    pool = HostPool(config.launch.deepspeed, config.launch.device)
    for model in model_names(config):
        layout = training_job(config, model).layout
        pool.require_room(model, layout.ranks, layout.colocated)


def _become_rank_of_environment(environment: MutableMapping[str, str]) -> None:
    from btm_scale.launch.ranks import become_rank_of_environment

    become_rank_of_environment(environment)


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
    "deepspeed": Launcher("hosts of a hostfile", groups=_on_hosts, require=_require_hosts),
    "slurm": Launcher("a SLURM cluster", groups=_by_srun, submit=_submit_to_slurm, become_rank=_become_slurm_rank),
    "mpi": Launcher("ranks of mpirun", groups=_by_mpirun, train=_train_under_mpi),
    "env": Launcher(
        "ranks of torchrun, PyTorchJob, Ray Train or SkyPilot", starts=False, become_rank=_become_rank_of_environment
    ),
}


class Starting:
    """The names of the launchers that start groups; the other ones are for ranks only."""

    def __iter__(self) -> Iterator[str]:
        return (name for name, launcher in LAUNCHERS.items() if launcher.starts)
