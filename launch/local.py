"""Groups on this machine: each has its own DeepSpeed launcher, and as many run at once as fit the GPUs or cores.

The per-host launcher is started directly, since the `deepspeed` command would give each group the first GPUs.
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
from btm_scale.launch.ranks import IS_RANK
from btm_scale.launch.room import Room, Share
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.util.devices import Device, Gpus, is_bound_to_one, usable_gpus

_FIRST_PORT = 10_000  # lower ports belong to services


class LocalPool:
    """This machine: `slots` groups at once, `threads` threads per rank, and one GPU per rank if there are GPUs.

    Raises LaunchError as `usable_gpus` does.
    """

    def __init__(self, slots: int, threads: int, device: Device = "auto") -> None:
        self._slots = slots
        self._threads = threads
        self._gpus = usable_gpus(device)
        self._room = Room({"localhost": self._gpus.names})
        self._running: dict[str, tuple[Share[str, str], ...]] = {}  # the GPUs of each running group

    def take(self, command: GroupCommand) -> Start | None:
        """Return the launcher of a group; None while `slots` groups run or too few GPUs are free.

        Raises LaunchError if the machine has fewer GPUs than the group has ranks.
        """
        require_gpus(self._gpus, command.name, command.ranks)
        if len(self._running) >= self._slots:
            return None
        shares = self._room.take(command.ranks) if self._gpus.names else ()
        if shares is None:
            return None
        self._running[command.name] = shares
        environment = {IS_RANK: "1", "OMP_NUM_THREADS": str(self._threads), SUPERVISOR: str(os.getpid())}
        own = shares[0].slots if shares else ()
        # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to the places of a group; -1 hides every GPU.
        places = own or ("-1",) * command.ranks
        return Start((_launcher(command, places, free_port()),), environment | self._gpus.environment(own))

    def give_back(self, name: str) -> None:
        """Free the GPUs of a group that has ended."""
        self._room.give_back(self._running.pop(name, ()))


def require_gpus(gpus: Gpus, name: str, ranks: int) -> None:
    """Raise LaunchError if this machine has GPUs, and a group has more ranks than can use them."""
    count = len(gpus.names)
    if count and ranks > 1 and gpus.are_mig:
        raise LaunchError(
            f"'{name}' has {ranks} ranks, and this machine's GPUs are MIG instances. CUDA gives a process only one of "
            "them: choose a layout of one rank, or disable MIG."
        )
    if 0 < count < ranks:
        raise LaunchError(
            f"'{name}' has {ranks} ranks, and this machine has {count} visible GPU{'s' if count > 1 else ''}. Each "
            "rank needs one: choose a smaller layout, or more hosts with --launcher deepspeed."
        )


def local_rank(environment: Mapping[str, str], place: str) -> str:
    """Return LOCAL_RANK of the task with this index on its node: 0 if it is bound to a single GPU."""
    return "0" if is_bound_to_one(environment) else place


def free_port() -> int:
    """Return a free port outside the range that the kernel uses for outgoing connections.

    Ranks need seconds to start, and a port in that range could be taken meanwhile. Raises LaunchError if none is free.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(_FIRST_PORT, _first_outgoing_port())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise LaunchError(
        "No free port found for a group. Rendezvous needs one below the range of outgoing connections: see `ss -tln` "
        "and `sysctl net.ipv4.ip_local_port_range`."
    )


def _first_outgoing_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    return first if first > _FIRST_PORT else 32768  # Linux's default


def _launcher(command: GroupCommand, places: Sequence[str], port: int) -> tuple[str, ...]:
    """Return the command of a group. `places` is the GPU of each rank, or -1."""
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
