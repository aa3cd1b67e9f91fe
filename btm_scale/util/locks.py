"""Locks that end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from btm_scale.errors import GroupFailed, UserError
from btm_scale.util.files import make_directory

_LOCK_SECONDS = 2.0


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file and remove it afterwards; yields False if another process holds it."""
    make_directory(lock.parent)
    while True:
        with _opened(lock) as file:
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
    with _opened(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _opened(path: Path) -> IO[bytes]:
    """Open a lock file, and never what a link of that name leads to. Its content is left as it is.

    Raises UserError for a link, or for anything else that is not a file.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:  # another user's, which can be locked all the same
            descriptor = os.open(path, os.O_RDONLY | flags)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _not_a_lock(path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_lock(path)
    return os.fdopen(descriptor, "rb")


def _not_a_lock(path: Path) -> UserError:
    return UserError(f"Cannot lock {path}: it is a link or not a file. A lock is a file made by btm-scale. Remove it.")


def _is_named(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def is_held(lock: Path) -> bool:
    """Return whether a process holds a lock file."""
    # A shared lock needs only read permission, so that other users can inspect a run.
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(lock, flags), "rb") as file:
            return not _locked(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


class ModelLock:
    """Held by the first rank of the group that trains a model; the kernel releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        make_directory(self._path.parent)
        self._file = _opened(self._path)
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
        return is_held(folder / "lock")


def _locked(file: IO[bytes], kind: int = fcntl.LOCK_EX) -> bool:
    """Lock a file until it is closed; returns False if another process holds the lock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
