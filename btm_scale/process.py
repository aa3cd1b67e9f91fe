"""Processes that end with the one that supervises them, and locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

from btm_scale.errors import GroupFailed

# The exit code of ranks that were asked to stop, have saved their state, and go on from it when they are started again.
REQUEUE = 85

# The environment variable that names the supervisor's process to every rank of a local group.
SUPERVISOR = "BTM_SCALE_SUPERVISOR"

_LOCK_SECONDS = 2.0


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
        watch = threading.Thread(
            target=_exit_after, args=(parent.sentinel,), daemon=True, name="parent-watch"
        )
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


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file, which goes when its holder does; gives False where another process has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            if not _locked(file):
                yield False
                return
            if not _is_named(file, lock):  # its last holder has just removed it
                continue
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_named(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class ModelLock:
    """Held by the first rank of the group that trains a model; the kernel lets go of it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        # Whoever asks whether it is held holds it for that moment.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _locked(self._file):
            if time.monotonic() > deadline:
                self._file.close()
                # No mistake: after a node was lost, its lock may outlive it for a while, and a later try succeeds.
                raise GroupFailed(
                    f"another group is training in {self._path.parent}; wait until it ends, or end it"
                )
            time.sleep(_LOCK_SECONDS / 20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether some process holds the lock now."""
        # A shared lock takes no more than leave to read, so that others may look at a run.
        try:
            with (folder / "lock").open() as file:
                return not _locked(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def _locked(file: TextIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file until it is closed, unless another process has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
