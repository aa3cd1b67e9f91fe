"""The launchers by their names on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from btm_scale.config.run import RunConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.deepspeed import HostPool
from btm_scale.launch.mpi import MpiLauncher, run_under_mpi, started_by_mpirun
from btm_scale.launch.slurm import SrunPool
from btm_scale.launch.supervise import GroupCommand, OnPoll, Pool, RunGroups, run_groups_in
from btm_scale.run_dir import RunDir
from btm_scale.run_state import training_commands


def launcher_named(name: str, config: RunConfig) -> RunGroups | None:
    """How this process starts groups; None for this machine, whose room depends on what is started."""
    if name == "slurm":
        return _in(SrunPool(config.launch.slurm))
    if name == "deepspeed":
        return _in(HostPool(config.launch.deepspeed))
    if name == "mpi":
        return MpiLauncher(config.launch.mpi)
    return None


def _in(pool: Pool) -> RunGroups:
    def run(commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        run_groups_in(pool, commands, on_poll)

    return run


def train_under_mpi(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    """Train the models as one of the ranks that mpirun has started; all of them call this together."""
    if not started_by_mpirun():
        raise LaunchError(
            "train --launcher mpi is for the ranks of mpirun: mpirun -n RANKS btm-scale train CONFIG --launcher mpi; "
            "`btm-scale run CONFIG --launcher mpi` calls mpirun itself"
        )
    run_under_mpi(training_commands(config, run, models), config.launch.mpi.threads)
