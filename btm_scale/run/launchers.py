"""Start the groups of a stage, in parallel on this machine or wherever a launcher places them.

The process that starts groups does not import torch; only the groups do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from btm_scale.config.run import RunConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.local import LocalPool
from btm_scale.launch.mpi import run_under_mpi
from btm_scale.launch.supervise import GroupCommand, RunGroups, groups_in
from btm_scale.run.launcher_table import LAUNCHERS
from btm_scale.run.state import progress, state_at_rest, training_commands
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.train.progress import ModelProgress
from btm_scale.util.cores import visible_cores
from btm_scale.util.devices import Device, usable_gpus_or_none
from btm_scale.util.mpi import mpi_rank

logger = logging.getLogger(__name__)

Progress = Callable[[Sequence[ModelProgress]], None]


@dataclass(frozen=True)
class Placement:
    """How groups share this machine. It is the same whenever a run resumes, because results depend on the threads."""

    slots: int
    threads: int  # per rank
    device: Device = "auto"


def placement(config: RunConfig, models: Sequence[str]) -> Placement:
    """Return how the groups of a stage share this machine's cores and GPUs."""
    cores = visible_cores()
    ranks = max(training_job(config, model).layout.ranks for model in models)
    gpus = usable_gpus_or_none(config.launch.device).names
    slots = config.launch.local.slots or max(1, (len(gpus) or cores) // ranks)
    slots = min(slots, len(models))
    return Placement(slots, max(1, cores // (slots * ranks)), config.launch.device)


def run_training(
    config: RunConfig,
    run: RunDir,
    models: Sequence[str],
    *,
    on_progress: Progress,
    launcher: RunGroups | None = None,
) -> None:
    """Train, export and score the models that are not completed yet."""
    commands = training_commands(config, run, models)
    todo = [command.name for command in commands]
    done = {model: "done" for model in models if model not in todo}

    def poll(states: dict[str, str]) -> None:
        on_progress(progress(config, run, done | states))

    try:
        if commands:
            launcher = launcher or here(_checked(placement(config, models), commands))
            launcher(commands, poll)
    finally:
        on_progress(progress(config, run, {model: state_at_rest(config, run, model) for model in models}))


def _checked(place: Placement, commands: Sequence[GroupCommand]) -> Placement:
    """Return the placement; warn if its groups have more threads than this machine has cores."""
    cores = visible_cores()
    threads = place.slots * max(command.ranks for command in commands) * place.threads
    if threads > cores and not usable_gpus_or_none(place.device).names:
        logger.warning(
            "%d groups train side by side with %d threads on %d cores: each step takes longer. Set launch.local.slots "
            "to a lower number, or choose a layout of fewer ranks.",
            place.slots,
            threads,
            cores,
        )
    return place


def here(place: Placement) -> RunGroups:
    """Return a launcher that starts groups on this machine with this placement."""
    return groups_in(LocalPool(place.slots, place.threads, place.device))


def launcher_named(name: str, config: RunConfig) -> RunGroups | None:
    """Return the named launcher; None for this machine, whose placement depends on the models that are started."""
    groups = LAUNCHERS[name].groups
    return None if groups is None else groups(config.launch)


def train_under_mpi(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    """Train the models as one of the ranks that mpirun started. All ranks call this together."""
    if mpi_rank() is None:
        raise LaunchError(
            "train --launcher mpi must be started by mpirun: mpirun -n RANKS btm-scale train CONFIG --launcher mpi. Or "
            "use btm-scale run CONFIG --launcher mpi, which calls mpirun itself."
        )
    run_under_mpi(training_commands(config, run, models), config.launch.mpi.threads, config.launch.device)
