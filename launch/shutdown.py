"""Stopping groups: ranks are asked to save, or are killed with their launchers, and a rank ends with its supervisor."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

import psutil

from btm_scale.util import stop_signal

logger = logging.getLogger(__name__)

# The exit code of ranks that were asked to stop and saved a checkpoint; a restart resumes them.
REQUEUE = stop_signal.EXIT_CODE

# The environment variable with the process id of the supervisor, for the ranks of a local group.
SUPERVISOR = "BTM_SCALE_SUPERVISOR"

# The file in a model's folder that marks training that ended early, but cleanly, because it was asked to.
STOPPED = "stopped"

_POLL_SECONDS = 0.05
_TERM_SECONDS = 10.0
_SAVE_SECONDS = 300.0  # for a group to finish its step and save a checkpoint


def let_save(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Send SIGTERM to the ranks on this machine, so that they save and exit, and wait for their launchers.

    The launchers get no signal, since they would not wait for their ranks. Groups on other hosts cannot be asked.
    """
    ranks = _ranks_below({process.pid for process in processes})
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _SAVE_SECONDS
    for process in processes:
        if process.pid in ranks.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def _ranks_below(launchers: Collection[int]) -> dict[int, int]:
    """Return the ranks that these launchers started on this machine, each with its launcher. Other launchers may be in
    between, and mpirun gives each rank its own session."""
    launcher_of = {pid: pid for pid in launchers}
    ranks = {}
    for process in psutil.Process().children(recursive=True):  # a parent comes before its children
        with contextlib.suppress(psutil.Error):
            parent = process.ppid()
            launcher = launcher_of.get(parent)
            if launcher is None:
                continue
            launcher_of.setdefault(process.pid, launcher)
            if _is_rank(process.pid) and not _is_rank(parent):
                ranks[process.pid] = launcher
    return ranks


def _is_rank(pid: int) -> bool:
    try:
        return "RANK" in psutil.Process(pid).environ()
    except psutil.Error:
        return False


def end_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End launchers and all processes in their sessions: by SIGTERM, and after a timeout by SIGKILL."""
    # The ranks of a launcher that was killed are still in its session.
    remaining = [process for process in processes if process.poll() != 0]
    for process in remaining:
        _signal_session(process, signal.SIGTERM)
    deadline = time.monotonic() + _TERM_SECONDS
    while remaining and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        remaining = [process for process in remaining if process.poll() is None or _has_members(process)]
    for process in remaining:
        _signal_session(process, signal.SIGKILL)
        process.wait()


def _has_members(process: subprocess.Popen[bytes]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_session(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def end_with_supervisor() -> None:
    """Watch the supervisor, if there is one, and kill the process group when it ends.

    Ranks of a killed run must not write beside those of the next one.
    """
    pid = os.environ.get(SUPERVISOR)
    if pid is None:
        return
    try:
        descriptor = os.pidfd_open(int(pid))
    except ProcessLookupError:
        _end_own_group()
    threading.Thread(target=_watch, args=(descriptor,), daemon=True, name="supervisor-watch").start()


def _watch(descriptor: int) -> None:
    select.select([descriptor], [], [])
    _end_own_group()


def _end_own_group() -> NoReturn:
    logger.error("the process that started this group is gone; ending the group")
    os.killpg(0, signal.SIGKILL)
    raise AssertionError
