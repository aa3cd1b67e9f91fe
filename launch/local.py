"""Groups on this machine: each a `deepspeed` launcher of its own, as many at a time as the cores hold."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.process import SUPERVISOR

_POLL_SECONDS = 0.2
_TERM_SECONDS = 10.0


@dataclass(frozen=True)
class GroupCommand:
    """One group to start: its name, its ranks, what every rank runs, and where its output goes."""

    name: str
    ranks: int
    arguments: tuple[str, ...]  # of btm-scale
    log: Path


def launcher_command(command: GroupCommand, port: int) -> list[str]:
    """The `deepspeed` command line that starts a group on this machine."""
    return [
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
    ]


def run_groups(
    commands: Sequence[GroupCommand],
    *,
    slots: int,
    threads: int,
    on_poll: Callable[[dict[str, str]], None] = lambda states: None,
) -> None:
    """Run every group, `slots` at a time in the order given, with `threads` threads a rank.

    `on_poll` is told each group's state: waiting, running, done or failed. A group's failure stops no other; when all
    have ended, GroupFailed tells which failed, with the last lines of their logs. Whatever ends this call ends
    its groups too.
    """
    states = {command.name: "waiting" for command in commands}
    waiting = list(commands)
    running: dict[str, subprocess.Popen[bytes]] = {}
    by_name = {command.name: command for command in commands}
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                command = waiting.pop(0)
                running[command.name] = _start(command, threads)
                states[command.name] = "running"
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    states[name] = "done" if process.returncode == 0 else "failed"
            on_poll(dict(states))
            time.sleep(_POLL_SECONDS)
    finally:
        _end_all(running.values())
    failed = [name for name, state in states.items() if state == "failed"]
    if failed:
        raise GroupFailed("\n".join(_failure(by_name[name]) for name in failed))


def _start(command: GroupCommand, threads: int) -> subprocess.Popen[bytes]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment[SUPERVISOR] = str(os.getpid())
    if not _has_gpu():
        environment["DS_ACCELERATOR"] = "cpu"
    try:
        with command.log.open("ab") as log:
            # A session of its own, so that the launcher and every rank can be ended together.
            return subprocess.Popen(
                launcher_command(command, _free_port()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise LaunchError(f"group '{command.name}' cannot be started: {error}") from None


def _end_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    remaining = [process for process in processes if process.poll() is None]
    for process in remaining:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + _TERM_SECONDS
    for process in remaining:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _failure(command: GroupCommand) -> str:
    lines = command.log.read_text(errors="replace").splitlines()[-25:]
    return f"group '{command.name}' failed; the end of {command.log}:\n" + "\n".join(
        f"  {line}" for line in lines
    )
