"""The launchers by their names on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from btm_scale.config import RunConfig
from btm_scale.launch.slurm import SrunPool
from btm_scale.launch.supervise import GroupCommand, OnPoll, Pool, run_groups_in
from btm_scale.pipeline import Launcher


def launcher_named(name: str, config: RunConfig) -> Launcher | None:
    """How this process starts groups; None for this machine, whose room depends on what is started."""
    if name == "slurm":
        return _in(SrunPool(config.launch.slurm))
    return None


def _in(pool: Pool) -> Launcher:
    def run(commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        run_groups_in(pool, commands, on_poll)

    return run
