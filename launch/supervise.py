"""Starting groups side by side, watching them, and ending them with whoever started them.

What differs between launchers is a `Pool`: where there is room for a group, and which processes start it there.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch.shutdown import REQUEUE, end_all, let_save
from btm_scale.util.files import make_directory
from btm_scale.util.rank_log import forget_failure, note_silent_failure, read_failure, tail

_POLL_SECONDS = 0.2

OnPoll = Callable[[dict[str, str]], None]


@dataclass(frozen=True)
class GroupCommand:
    """One group to start: its name, its ranks, what every rank runs, and where its output goes."""

    name: str
    ranks: int
    arguments: tuple[str, ...]  # of btm-scale
    log: Path
    colocated: int = 1  # consecutive ranks that must share a host
    work: float = 1.0  # how long it takes, relative to others


@dataclass(frozen=True)
class Start:
    """The processes that start a group, and what they find in their environment besides this process's own."""

    processes: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)


# What runs groups, and tells their states as it goes; see `run_groups_in`.
RunGroups = Callable[[Sequence[GroupCommand], OnPoll], None]


class Pool(Protocol):
    """Room for groups."""

    def take(self, command: GroupCommand) -> Start | None:
        """How to start the group, in room that is now taken; None while there is none.

        Raises LaunchError if there never will be.
        """

    def give_back(self, name: str) -> None:
        """The group of this name has ended."""


def run_groups_in(pool: Pool, commands: Sequence[GroupCommand], on_poll: OnPoll = lambda states: None) -> None:
    """Run every group as soon as the pool has room for it, in the order given.

    `on_poll` is told each group's state: waiting, running, done, stopped or failed. A group's failure stops no other;
    when all have ended, GroupFailed tells which failed, with the last lines of the log of the rank that failed first.
    Whatever ends this call ends its groups too. SIGTERM and SIGUSR1 are passed on: the groups save their states, and
    SystemExit has the code that asks for this process to be started again.
    """
    states = {command.name: "waiting" for command in commands}
    waiting = list(commands)
    running: dict[str, list[subprocess.Popen[bytes]]] = {}
    before = _on_stop(_ask_to_start_again)
    try:
        while waiting or running:
            for command in list(waiting):
                start = pool.take(command)
                if start is not None:
                    waiting.remove(command)
                    running[command.name] = _start(command, start)
                    states[command.name] = "running"
            for name, processes in list(running.items()):
                codes = [process.poll() for process in processes]
                if any(codes):
                    end_all(processes)  # a group that has lost a part of itself is over
                elif None in codes:
                    continue
                del running[name]
                pool.give_back(name)
                states[name] = "stopped" if REQUEUE in codes else "failed" if any(codes) else "done"
                command = next(command for command in commands if command.name == name)
                # What takes no arguments is no group, but mpirun.
                if any(codes) and REQUEUE not in codes and command.arguments:
                    note_silent_failure(command.log, command.ranks)
            on_poll(dict(states))
            time.sleep(_POLL_SECONDS)
    except SystemExit:
        print("asked to stop: running groups save their states", file=sys.stderr, flush=True)
        let_save([process for processes in running.values() for process in processes])
        raise
    finally:
        end_all(process for processes in running.values() for process in processes)
        for command in commands:
            if command.name in running:  # interrupted: what its ranks reported while they were ended is not a failure
                forget_failure(command.log)
        for number, handler in before.items():
            signal.signal(number, handler)
    stopped = [
        f"group '{name}' was stopped; the same command resumes it" for name in states if states[name] == "stopped"
    ]
    failed = [failure_text(command) for command in commands if states[command.name] == "failed"]
    if failed or stopped:
        raise GroupFailed("\n".join([*failed, *stopped]))


def groups_in(pool: Pool) -> RunGroups:
    """What runs groups in a pool; see `run_groups_in`."""
    return functools.partial(run_groups_in, pool)


def failure_text(command: GroupCommand) -> str:
    """Why a group failed, from what its ranks left behind."""
    failure = read_failure(command.log)
    if failure is not None:
        return f"group '{command.name}' failed: {failure}"
    lines = "\n".join(f"  {line}" for line in tail(command.log))
    return f"group '{command.name}' failed; the end of {command.log}:\n{lines}"


def _start(command: GroupCommand, start: Start) -> list[subprocess.Popen[bytes]]:
    make_directory(command.log.parent)
    forget_failure(command.log)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", **start.environment}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with command.log.open("ab") as log:
            for words in start.processes:
                # A session of its own, so that the launcher and every rank can be ended together.
                processes.append(
                    subprocess.Popen(
                        words,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                )
    except BaseException as error:  # a request to stop, too, may come between two of them
        end_all(processes)
        if isinstance(error, OSError):
            raise LaunchError(f"group '{command.name}' cannot be started: {error}") from None
        raise
    return processes


def _on_stop(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let a handler hear SIGTERM and SIGUSR1; returns what heard them before, nothing where no handler can be set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}


def _ask_to_start_again(number: int, frame: FrameType | None) -> None:
    # Whoever asks once more must not cut short what was asked for first; SIGINT does.
    _on_stop(lambda number, frame: None)
    raise SystemExit(REQUEUE)
