"""Locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TextIO

from btm_scale.errors import GroupFailed
from btm_scale.util.files import make_directory

_LOCK_SECONDS = 2.0


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file and remove it afterwards; yields False if another process holds it."""
    make_directory(lock.parent)
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


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds a lock file, and hold it."""
    make_directory(lock.parent)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_named(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class ModelLock:
    """Held by the first rank of the group that trains a model; the kernel releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        make_directory(self._path.parent)
        self._file = self._path.open("w")
        # `is_held` takes the lock for a moment.
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _locked(self._file):
            if time.monotonic() > deadline:
                self._file.close()
                # Not a user error: the lock of a lost node may remain for a while, and a retry succeeds.
                raise GroupFailed(
                    f"another group is training in {self._path.parent}; only one may: wait until it ends, or stop it"
                )
            time.sleep(_LOCK_SECONDS / 20)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Return whether a process holds the lock."""
        # A shared lock needs only read permission, so that other users can inspect a run.
        try:
            with (folder / "lock").open() as file:
                return not _locked(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def _locked(file: TextIO, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file until it is closed; returns False if another process holds the lock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
