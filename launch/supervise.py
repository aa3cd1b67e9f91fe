"""Start groups at once, watch them, and end them with the process that started them.

Launchers differ in their `Pool`: where there is room for a group, and which processes start it there.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch.shutdown import REQUEUE, STOPPED, end_all, let_save
from btm_scale.util.disk_errors import is_transient
from btm_scale.util.files import make_directory, open_to_append
from btm_scale.util.pools import AT_LIMIT, is_at_limit
from btm_scale.util.rank_log import forget_failure, note_silent_failure, read_failure, tail
from btm_scale.util.stop_signal import leave_if_requested

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_PORTS = 4  # that a group tries

OnPoll = Callable[[dict[str, str]], None]


@dataclass(frozen=True)
class GroupCommand:
    """A group to start: its name, its ranks, what each rank runs, and where its output goes."""

    name: str
    ranks: int
    arguments: tuple[str, ...]  # of the btm-scale command
    log: Path
    colocated: int = 1  # consecutive ranks that must share a host
    work: float = 1.0  # duration, relative to other groups


@dataclass(frozen=True)
class Start:
    """The processes that start a group, and the variables added to their environment, or `only` those."""

    processes: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    only: bool = False


# Runs groups and reports their states; see `run_groups_in`.
RunGroups = Callable[[Sequence[GroupCommand], OnPoll], None]


class Pool(Protocol):
    """The resources that groups share."""

    def take(self, command: GroupCommand) -> Start | None:
        """Take room for a group and return how to start it; None while there is no room.

        Raises LaunchError if there can never be room.
        """

    def give_back(self, name: str) -> None:
        """Free the room of a group that has ended."""


def run_groups_in(pool: Pool, commands: Sequence[GroupCommand], on_poll: OnPoll = lambda states: None) -> None:
    """Run every group as soon as the pool has room for it, in the order given.

    `on_poll` gets the state of each group: waiting, running, done, stopped or failed. A failing group does not stop the
    others. Raises GroupFailed once all have ended, with the last log lines of the rank that failed first in each.
    Groups end with this call, however it ends. On SIGTERM or SIGUSR1 the groups save checkpoints, and SystemExit is
    raised with the code that requests a restart.
    """
    states = {command.name: "waiting" for command in commands}
    waiting = list(commands)
    ports: Counter[str] = Counter()
    running: dict[str, list[subprocess.Popen[bytes]]] = {}
    before = _on_stop(_ask_to_start_again)
    try:
        leave_if_requested()
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
                    end_all(processes)  # a group that lost a process has failed
                elif None in codes:
                    continue
                del running[name]
                pool.give_back(name)
                command = next(command for command in commands if command.name == name)
                # The launcher may end the other ranks of a group that stops, and return a code of theirs.
                was_stopped = any(codes) and (REQUEUE in codes or (command.log.parent / STOPPED).is_file())
                states[name] = "stopped" if was_stopped else "failed" if any(codes) else "done"
                # A command without arguments is mpirun, not a group.
                if states[name] == "failed" and command.arguments:
                    note_silent_failure(command.log, command.ranks)
                    ports[name] += 1
                    failure = read_failure(command.log)
                    if failure is not None and failure.port_taken and ports[name] < _PORTS:
                        logger.warning("group '%s' starts again at another port: %s", name, failure.error)
                        states[name] = "waiting"
                        waiting.append(command)
            on_poll(dict(states))
            time.sleep(_POLL_SECONDS)
    except SystemExit:
        logger.warning("asked to stop: running groups save their states")
        let_save([process for processes in running.values() for process in processes])
        raise
    finally:
        end_all(process for processes in running.values() for process in processes)
        for command in commands:
            if command.name in running:  # interrupted: what its ranks reported while they were ended is not a failure
                forget_failure(command.log)
        for number, handler in before.items():
            signal.signal(number, handler)
    stopped = [name for name in states if states[name] == "stopped"]
    failed = [command for command in commands if states[command.name] == "failed"]
    if failed or stopped:
        raise group_failure(failed, stopped)


def groups_in(pool: Pool) -> RunGroups:
    """Return `run_groups_in` for a pool."""
    return functools.partial(run_groups_in, pool)


def group_failure(failed: Sequence[GroupCommand], stopped: Sequence[str] = ()) -> GroupFailed:
    """Return the exception for groups that failed, by the records and logs of their ranks, or were stopped.

    Groups that failed for the same reason are reported once.
    """
    names: dict[str, list[str]] = {}
    mistakes = []
    for command in failed:
        failure = read_failure(command.log)
        reason = f"failed: {failure}" if failure is not None else _end_of(command.log)
        names.setdefault(reason, []).append(f"'{command.name}'")
        mistakes.append(failure is not None and failure.mistake)
    texts = [f"group{'s' if len(listed) > 1 else ''} {', '.join(listed)} {why}" for why, listed in names.items()]
    texts += [f"group '{name}' was stopped; the same command resumes it" for name in stopped]
    return GroupFailed("\n".join(texts), mistake=all(mistakes) and not stopped)


def _end_of(log: Path) -> str:
    lines = "\n".join(f"  {line}" for line in tail(log))
    return f"failed; the end of {log}:\n{lines}"


def _start(command: GroupCommand, start: Start) -> list[subprocess.Popen[bytes]]:
    make_directory(command.log.parent)
    forget_failure(command.log)
    (command.log.parent / STOPPED).unlink(missing_ok=True)
    environment = {**({} if start.only else os.environ), "TOKENIZERS_PARALLELISM": "false", **start.environment}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with open_to_append(command.log) as log:
            for words in start.processes:
                # Its own session, so that the launcher and all ranks can be ended together.
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
    except BaseException as error:  # including a stop request between two of them
        end_all(processes)
        if isinstance(error, OSError) and is_at_limit(error):
            raise GroupFailed(f"group '{command.name}' cannot be started: {AT_LIMIT.format(error.strerror)}") from None
        if isinstance(error, OSError) and not is_transient(error):
            raise LaunchError(f"group '{command.name}' cannot be started: {error}") from None
        raise
    return processes


def _on_stop(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Set a handler for SIGTERM and SIGUSR1; returns the previous ones, empty outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGUSR1)}


def _ask_to_start_again(number: int, frame: FrameType | None) -> None:
    # A second request must not interrupt the first; SIGINT does.
    _on_stop(lambda number, frame: None)
    raise SystemExit(REQUEUE)
