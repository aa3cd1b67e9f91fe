"""Groups on this machine: each a `deepspeed` launcher of its own, as many at a time as the cores hold."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from btm_scale.launch.supervise import GroupCommand, OnPoll, Start, run_groups_in

from btm_scale.errors import LaunchError
from btm_scale.process import SUPERVISOR

_FIRST_PORT = 10_000  # below are those of services

__all__ = ["GroupCommand", "LocalPool", "free_port", "run_groups"]


class LocalPool:
    """This machine: `slots` groups at a time, with `threads` threads a rank."""

    def __init__(self, slots: int, threads: int) -> None:
        self._slots = slots
        self._threads = threads
        self._running: set[str] = set()

    def take(self, command: GroupCommand) -> Start | None:
        """A `deepspeed` launcher, if fewer than `slots` groups run."""
        if len(self._running) >= self._slots:
            return None
        self._running.add(command.name)
        environment = {"OMP_NUM_THREADS": str(self._threads), SUPERVISOR: str(os.getpid())}
        return Start((_launcher(command, free_port()),), environment | accelerator())

    def give_back(self, name: str) -> None:
        """The group of this name has ended."""
        self._running.discard(name)


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
    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    return {} if has_gpu else {"DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    """A port on which nothing listens, of those that the kernel gives to no outgoing connection.

    Ranks need seconds to start; one of the kernel's own could be gone until then.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(_FIRST_PORT, _first_outgoing_port())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise LaunchError(
        "no free port found for a group: see `ss -tln`, and `sysctl net.ipv4.ip_local_port_range`"
    )


def _first_outgoing_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    return first if first > _FIRST_PORT else 32768  # Linux's default


def _launcher(command: GroupCommand, port: int) -> tuple[str, ...]:
    return (
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        os.devnull,  # no cluster's hostfile may draw a local group away
        "--num_gpus",
        str(command.ranks),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        "--no_local_rank",
        "--module",
        "btm_scale.cli",
        *command.arguments,
    )
