"""Processes that end with the one that supervises them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import threading

# The exit code of ranks that were asked to stop, have saved their state, and go on from it when they are started again.
REQUEUE = 85

# The environment variable that names the supervisor's process to every rank of a local group.
SUPERVISOR = "BTM_SCALE_SUPERVISOR"


def end_with_supervisor() -> None:
    """Watch the supervisor, if there is one, and kill this process's whole group when it is gone.

    A run that was killed leaves no rank behind that would go on writing beside the next one.
    """
    pid = os.environ.get(SUPERVISOR)
    if pid is None:
        return
    try:
        descriptor = os.pidfd_open(int(pid))
    except ProcessLookupError:
        _end()
    threading.Thread(target=_watch, args=(descriptor,), daemon=True, name="supervisor-watch").start()


def end_with_parent() -> None:
    """In a worker of a process pool: end when the process that made the pool is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True, name="parent-watch")
        watch.start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _watch(descriptor: int) -> None:
    select.select([descriptor], [], [])
    _end()


def _end() -> None:
    print("the process that started this group is gone; ending the group", flush=True)
    os.killpg(0, signal.SIGKILL)
