"""Groups under mpirun: COMM_WORLD is split once, and MPI is finalized before any group starts.

Each group is then a separate torch.distributed world: a rank of MPI starts a rank of its group, waits for it, and
starts the next one. Groups share nothing but the file system.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from btm_scale.config.launch import MpiConfig
from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch.local import free_port, local_rank
from btm_scale.launch.placement import Work, share_out
from btm_scale.launch.ranks import IS_RANK
from btm_scale.launch.shutdown import REQUEUE, SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, OnPoll, Start, group_failure, run_groups_in
from btm_scale.util.cores import visible_cores
from btm_scale.util.devices import Device, environment_of_this_host, usable_gpus
from btm_scale.util.files import make_directory
from btm_scale.util.logs import set_up_logging
from btm_scale.util.mpi import without_mpi
from btm_scale.util.rank_log import forget_failure

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Place:
    """The place of this MPI rank: its group, its rank there, and the rendezvous of the group (one port per command)."""

    group: int
    groups: int
    rank: int
    local_rank: int
    address: str
    ports: tuple[int, ...]
    ended: Path  # a folder of this mpirun in which each group leaves a file when it has ended


def run_under_mpi(commands: Sequence[GroupCommand], threads: int, device: Device = "auto") -> None:
    """Run every group on the ranks of one mpirun; ranks left over after the last complete group stay idle.

    A failing group does not stop the others. Raises GroupFailed on the first rank of a failed group once all groups
    have ended, and LaunchError on all ranks if there are fewer than a group needs. A group that was asked to stop
    starts no further work, and its ranks exit with the code that requests a restart.
    """
    if not commands:
        return
    size = max(command.ranks for command in commands)
    works = [Work(command.name, command.ranks, command.colocated, command.work) for command in commands]
    by_name = {command.name: command for command in commands}
    place, lists = _split(works, size, commands[0].log.parent.parent)
    if place is None:
        return
    failed, stopped = [], False
    for number, work in enumerate(lists[place.group]):
        if place.rank < work.ranks and not stopped:
            command = by_name[work.name]
            code = _run_rank(command, place, place.ports[number], threads, device)
            stopped = code == REQUEUE
            if code != 0 and not stopped:
                failed.append(command)
    _end(place, stopped or bool(failed))
    if stopped:
        sys.exit(REQUEUE)
    if failed:
        if place.rank > 0:
            sys.exit(1)  # the first rank of the group reports the reason
        raise group_failure(failed)


class MpiLauncher:
    """`run --launcher mpi`: one mpirun per stage, whose ranks are split into the groups of the stage."""

    def __init__(self, config: MpiConfig, device: Device = "auto") -> None:
        self._config = config
        self._device = device

    def __call__(self, commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        """Run every group."""
        if not commands:
            return
        name, *options = self._config.command
        # The one of this environment first, which mpi4py was built for.
        mpirun = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if mpirun is None:
            raise LaunchError(f"'{name}' is not installed. Set launch.mpi.command, or pip install mpich mpi4py.")
        # A rank uses one GPU, or one core of a machine without any.
        ranks = self._config.ranks or len(usable_gpus(self._device).names) or visible_cores()
        log = commands[0].log.parent.parent / "mpirun.log"
        for command in commands:
            forget_failure(command.log)  # if mpirun itself fails, an old record must not be reported
        make_directory(log.parent)
        with tempfile.NamedTemporaryFile("w", suffix=".json", dir=log.parent, delete=False) as file:
            json.dump([asdict(command) | {"log": str(command.log)} for command in commands], file)
        words = (
            mpirun,
            *options,
            "-n",
            str(ranks),
            sys.executable,
            "-m",
            "btm_scale.launch.mpi",
            file.name,
        )
        try:
            run_groups_in(
                _OneCommand((*words, str(self._config.threads), self._device)),
                [GroupCommand("mpirun", ranks, (), log)],
                lambda states: on_poll({command.name: states["mpirun"] for command in commands}),
            )
        except GroupFailed:
            failed = [command for command in commands if _has_failed(command)]
            if not failed:
                raise
            raise group_failure(failed) from None
        finally:
            Path(file.name).unlink()


class _OneCommand:
    """A pool that runs a single given command."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    def take(self, command: GroupCommand) -> Start | None:
        return Start((self._words,), {SUPERVISOR: str(os.getpid())})

    def give_back(self, name: str) -> None:
        pass


def _split(works: Sequence[Work], size: int, folder: Path) -> tuple[_Place | None, list[list[Work]]]:
    """Return the place of this rank, None if it is left over, and the work of each group. Finalizes MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed and finds no libmpi
        raise LaunchError(
            f"Cannot load MPI ({error}). --launcher mpi needs mpi4py and an MPI: pip install 'btm-scale[mpi]'."
        ) from None
    world: Any = MPI.COMM_WORLD
    groups = world.size // size
    if groups == 0:
        raise LaunchError(f"A group needs {size} ranks, and mpirun started {world.size}. Start {size} or more.")
    lists = share_out(works, min(groups, len(works)))
    number = world.rank // size
    member = number < len(lists)
    ended = folder / f".mpi-{secrets.token_hex(4)}"
    if world.rank == 0:
        make_directory(ended)
    ended = world.bcast(ended)
    local_rank = world.Split_type(MPI.COMM_TYPE_SHARED).rank
    group = world.Split(number if member else MPI.UNDEFINED, world.rank)
    place = None
    if member:
        one_host = group.Split_type(MPI.COMM_TYPE_SHARED).size == group.size
        own = "127.0.0.1" if one_host else socket.gethostname()
        address, ports = group.bcast((own, tuple(free_port() for _ in lists[number])))
        place = _Place(number, len(lists), group.rank, local_rank, address, ports, ended)
    MPI.Finalize()
    return place, lists


def _run_rank(command: GroupCommand, place: _Place, port: int, threads: int, device: Device = "auto") -> int:
    if place.rank == 0:
        forget_failure(command.log)
    environment = without_mpi(os.environ) | {
        IS_RANK: "1",
        "RANK": str(place.rank),
        "WORLD_SIZE": str(command.ranks),
        "LOCAL_RANK": local_rank(os.environ, str(place.local_rank)),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        SUPERVISOR: str(os.getpid()),
    }
    words = [sys.executable, "-m", "btm_scale.cli", *command.arguments]
    environment |= environment_of_this_host(device)
    process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)
    # Signals from mpirun are forwarded to the process that trains, which saves a checkpoint and exits.
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(place: _Place, failed: bool) -> None:
    """Record that this group has ended. mpirun kills all ranks when one fails, so a failed one waits for the rest."""

    def still_running() -> bool:
        try:
            return len(list(place.ended.iterdir())) < place.groups
        except FileNotFoundError:
            return False

    if place.rank == 0:
        (place.ended / str(place.group)).touch()
        if not still_running():
            shutil.rmtree(place.ended, ignore_errors=True)
    while failed and still_running():
        time.sleep(_POLL_SECONDS)


def _has_failed(command: GroupCommand) -> bool:
    return any(command.log.parent.glob(f"{command.log.name}.failed-*.json"))


def _main(arguments: Sequence[str]) -> None:
    path, threads, device = arguments
    commands = []
    for values in json.loads(Path(path).read_text()):
        values |= {"log": Path(values["log"]), "arguments": tuple(values["arguments"])}
        commands.append(GroupCommand(**values))
    set_up_logging()
    try:
        run_under_mpi(commands, int(threads), device)  # type: ignore[arg-type]
    except (GroupFailed, LaunchError) as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    _main(sys.argv[1:])
