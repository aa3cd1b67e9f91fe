"""Groups under mpirun: COMM_WORLD is split once, at the start, and MPI is over before any group begins.

Each group then is a torch.distributed world of its own: a rank of MPI only starts a rank of the group, waits for it,
and starts its group's next one. Groups meet again in the file system at most.
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
from btm_scale.launch.local import accelerator, free_port, local_rank
from btm_scale.launch.placement import Work, share_out
from btm_scale.launch.shutdown import REQUEUE, SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, OnPoll, Start, failure_text, run_groups_in
from btm_scale.util.files import make_directory
from btm_scale.util.logs import set_up_logging
from btm_scale.util.mpi import without_mpi
from btm_scale.util.rank_log import forget_failure

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Place:
    """Where this rank of MPI stands: its group, its place in it, and its group's rendezvous (a port a command)."""

    group: int
    groups: int
    rank: int
    local_rank: int
    address: str
    ports: tuple[int, ...]
    ended: Path  # a folder of this mpirun's own, where each group leaves a file when it has ended


def run_under_mpi(commands: Sequence[GroupCommand], threads: int) -> None:
    """Run every group, as all ranks of one mpirun. Ranks that make no whole group have nothing to do.

    A failing group stops no other. Raises GroupFailed on the first rank of a group that failed, once all groups have
    ended; LaunchError, on all ranks, if there are fewer ranks than a group needs. A group that was asked to stop takes
    up no other work, and its ranks exit with the code that asks for another start.
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
            code = _run_rank(command, place, place.ports[number], threads)
            stopped = code == REQUEUE
            if code != 0 and not stopped:
                failed.append(command)
    _end(place, stopped or bool(failed))
    if stopped:
        sys.exit(REQUEUE)
    if failed:
        if place.rank > 0:
            sys.exit(1)  # the group's first rank tells why
        raise GroupFailed("\n".join(failure_text(command) for command in failed))


class MpiLauncher:
    """`run --launcher mpi`: one mpirun a stage, whose ranks are split into the stage's groups."""

    def __init__(self, config: MpiConfig) -> None:
        self._config = config

    def __call__(self, commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        """Run every group."""
        if not commands:
            return
        name, *options = self._config.command
        # This environment's own first, which mpi4py has been built for.
        mpirun = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if mpirun is None:
            raise LaunchError(f"'{name}' is not on this machine; set launch.mpi.command, or pip install mpich mpi4py")
        ranks = self._config.ranks or len(os.sched_getaffinity(0))
        log = commands[0].log.parent.parent / "mpirun.log"
        for command in commands:
            forget_failure(command.log)  # where mpirun itself fails, an earlier try's would be told
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
                _OneCommand((*words, str(self._config.threads))),
                [GroupCommand("mpirun", ranks, (), log)],
                lambda states: on_poll({command.name: states["mpirun"] for command in commands}),
            )
        except GroupFailed:
            told = [failure_text(command) for command in commands if _has_failed(command)]
            if not told:
                raise
            raise GroupFailed("\n".join(told)) from None
        finally:
            Path(file.name).unlink()


class _OneCommand:
    """Room for one command that is given."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    def take(self, command: GroupCommand) -> Start | None:
        return Start((self._words,), {SUPERVISOR: str(os.getpid())})

    def give_back(self, name: str) -> None:
        pass


def _split(works: Sequence[Work], size: int, folder: Path) -> tuple[_Place | None, list[list[Work]]]:
    """This rank's place, and every group's work; None for a rank that is left over. MPI is over afterwards."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed and finds no libmpi
        raise LaunchError(f"--launcher mpi needs mpi4py and an MPI ({error}); pip install 'btm-scale[mpi]'") from None
    world: Any = MPI.COMM_WORLD
    groups = world.size // size
    if groups == 0:
        raise LaunchError(f"a group needs {size} ranks, and mpirun has started {world.size}; start {size} or more")
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


def _run_rank(command: GroupCommand, place: _Place, port: int, threads: int) -> int:
    if place.rank == 0:
        forget_failure(command.log)
    environment = without_mpi(os.environ) | {
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
    process = subprocess.Popen(words, env=environment | accelerator(), stdin=subprocess.DEVNULL)
    # What mpirun passes on to this process is meant for the one that trains: it saves its state and leaves.
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in numbers}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(place: _Place, failed: bool) -> None:
    """Note that this group has ended. mpirun ends all others with a rank that fails, so such a rank waits for them."""

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
    path, threads = arguments
    commands = []
    for values in json.loads(Path(path).read_text()):
        values |= {"log": Path(values["log"]), "arguments": tuple(values["arguments"])}
        commands.append(GroupCommand(**values))
    set_up_logging()
    try:
        run_under_mpi(commands, int(threads))
    except (GroupFailed, LaunchError) as error:
        logger.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    _main(sys.argv[1:])
