"""Groups on this machine: each a launcher of DeepSpeed's of its own, as many at a time as GPUs or cores hold.

DeepSpeed's launcher of one host is started without the `deepspeed` command before it, which finds hosts and would give
every group of a machine its first GPUs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from btm_scale.errors import LaunchError
from btm_scale.launch.room import Room, Share
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, OnPoll, Start, run_groups_in

_FIRST_PORT = 10_000  # below are those of services


class LocalPool:
    """This machine: `slots` groups at a time, with `threads` threads a rank, and a GPU a rank where there are any."""

    def __init__(self, slots: int, threads: int) -> None:
        self._slots = slots
        self._threads = threads
        self._gpus = visible_gpus()
        self._room = Room({"localhost": self._gpus})
        self._running: dict[str, tuple[Share[str, str], ...]] = {}  # and the GPUs of each

    def take(self, command: GroupCommand) -> Start | None:
        """A launcher, if fewer than `slots` groups run and enough GPUs are free."""
        if self._gpus and not self._room.could_take(command.ranks):
            raise LaunchError(
                f"'{command.name}' has {command.ranks} ranks, and this machine shows {len(self._gpus)} GPUs; choose "
                "another layout for its group, or hosts with --launcher deepspeed"
            )
        if len(self._running) >= self._slots:
            return None
        shares = self._room.take(command.ranks) if self._gpus else ()
        if shares is None:
            return None
        self._running[command.name] = shares
        environment = {"OMP_NUM_THREADS": str(self._threads), SUPERVISOR: str(os.getpid())}
        places = shares[0].slots if shares else [str(rank) for rank in range(command.ranks)]
        return Start((_launcher(command, places, free_port()),), environment | accelerator())

    def give_back(self, name: str) -> None:
        """The group of this name has ended."""
        self._room.give_back(self._running.pop(name, ()))


def run_groups(
    commands: Sequence[GroupCommand],
    *,
    slots: int,
    threads: int,
    on_poll: OnPoll = lambda states: None,
) -> None:
    """Run every group on this machine; see `run_groups_in`."""
    run_groups_in(LocalPool(slots, threads), commands, on_poll)


def accelerator() -> dict[str, str]:
    """What tells DeepSpeed that there is no GPU here, where that is so."""
    has_gpu = visible_gpus() or Path("/dev/kfd").exists()
    return {} if has_gpu else {"DS_ACCELERATOR": "cpu"}


def visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip() not in ("", "-1")]
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia*"))
    return sorted((number for number in numbers if number.isdecimal()), key=int)


def local_rank(environment: Mapping[str, str], place: str) -> str:
    """LOCAL_RANK of a task at this place of its node. One that is bound to a single GPU sees it as its first."""
    bound = "CUDA_VISIBLE_DEVICES" in environment and "," not in environment["CUDA_VISIBLE_DEVICES"]
    return "0" if bound else place


def free_port() -> int:
    """A port on which nothing listens, of those that the kernel gives to no outgoing connection.

    Ranks need seconds to start; one of the kernel's own could be gone until then.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(_FIRST_PORT, _first_outgoing_port())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise LaunchError("no free port found for a group: see `ss -tln`, and `sysctl net.ipv4.ip_local_port_range`")


def _first_outgoing_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    return first if first > _FIRST_PORT else 32768  # Linux's default


def _launcher(command: GroupCommand, places: Sequence[str], port: int) -> tuple[str, ...]:
    """`places`: the GPU of each rank, or on a CPU any name."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": places}).encode()).decode()
    return (
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--no_local_rank",
        "--module",
        "btm_scale.cli",
        *command.arguments,
    )
