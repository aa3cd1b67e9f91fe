"""Locks between processes. The kernel releases a lock when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Self

from btm_scale.errors import GroupFailed, UserError
from btm_scale.util.files import make_directory
from btm_scale.util.no_follow import open_no_follow
from btm_scale.util.terminal import printable

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 2.0
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_SHOWN = 120  # characters of a command in a message


@contextmanager
def held(lock: Path) -> Iterator[bool]:
    """Hold a lock file and remove it afterwards; yields False if another process holds it."""
    while True:
        with _opened_once_there(lock) as file:
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
    with _in_turn(lock, fcntl.LOCK_EX):
        yield


@contextmanager
def shared(lock: Path) -> Iterator[None]:
    """Wait until no process holds a lock file `alone`, and hold it beside others that share it.

    A process that waits to hold it alone takes precedence over later requests to share it.
    """
    with _in_turn(lock, fcntl.LOCK_SH):
        yield


@contextmanager
def alone_at_once(lock: Path) -> Iterator[bool]:
    """Hold a lock file alone, without waiting; yields False if another process holds or shares it."""
    with _unless_refused(lock):
        while True:
            with _opened_once_there(lock) as file:
                is_ours = _locked(file)
                if is_ours and not _is_named(file, lock):  # a refused command has just removed it
                    continue
                yield is_ours
                return


@contextmanager
def _in_turn(lock: Path, kind: int) -> Iterator[None]:
    with _unless_refused(lock):
        while True:
            with _opened_once_there(lock) as file:
                # Without the queue, a process that waits to be alone could wait forever while others share the lock.
                with _opened_once_there(_queue_of(lock)) as queue:
                    if not _locked(queue) or not _locked(file, kind):
                        logger.info("waiting for %s, which holds %s", holder_of(lock), lock)
                        _wait_for(queue, fcntl.LOCK_EX)
                        _wait_for(file, kind)
                if not _is_named(file, lock):
                    continue
                yield
                return


def _queue_of(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.queue")


@contextmanager
def _unless_refused(lock: Path) -> Iterator[None]:
    """Remove the lock files that did not exist before, if the block raises UserError and no process holds them."""
    is_new, folder_is_new = not lock.exists(), not lock.parent.exists()
    try:
        yield
    except UserError:
        if is_new:
            with suppress(OSError), _opened(lock) as file:
                if _locked(file) and _is_named(file, lock):
                    lock.unlink()
                    _queue_of(lock).unlink(missing_ok=True)
        if folder_is_new:
            with suppress(OSError):  # not empty
                lock.parent.rmdir()
        raise


def _opened_once_there(lock: Path) -> IO[bytes]:
    """Open a lock file in a folder that is made if needed, and that a refused command may be removing."""
    while True:
        make_directory(lock.parent)
        try:
            return _opened(lock)
        except FileNotFoundError:
            continue


def holder_of(lock: Path) -> str:
    """Return which process holds a lock file, for a message."""
    try:
        number = str(lock.stat().st_ino)
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return "another process"
    # `1: FLOCK ADVISORY WRITE 123 fe:00:456 0 EOF`; the row of a process that waits has an arrow after its number.
    pids = [row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5].rpartition(":")[2] == number]
    for pid in pids:
        if pid == str(os.getpid()):
            continue
        try:
            words = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:  # a process in another container, or one that has ended while its child keeps the lock
            return f"process {pid}"
        command = shlex.join([Path(words[0]).name, *words[1:]])
        return f"process {pid} ({printable(command if len(command) <= _SHOWN else command[:_SHOWN] + '...')})"
    return "another process" if pids else "a process on another host"


def _opened(path: Path) -> IO[bytes]:
    """Open a lock file without following a link. Its content is left as it is.

    Raises UserError for a link, or for anything else that is not a file.
    """
    refusal = UserError(
        f"Cannot lock {path}: it is a link or not a file. A lock is a file made by btm-scale. Remove it."
    )
    try:
        descriptor = open_no_follow(path, os.O_RDWR | os.O_CREAT, refusal)
    except PermissionError as refused:  # another user's, which can be locked all the same
        try:
            descriptor = open_no_follow(path, os.O_RDONLY, refusal)
        except FileNotFoundError:
            raise refused from None
    return os.fdopen(descriptor, "rb")


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
                    f"another group is training in {self._path.parent} ({holder_of(self._path)}); only one may: wait "
                    "until it ends, or stop it"
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
    """Lock a file until it is closed; returns False if another process holds the lock.

    Raises UserError if its file system has no locks.
    """
    try:
        _wait_for(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for(file: IO[bytes], kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        path = Path(f"/proc/self/fd/{file.fileno()}").readlink()
        if error.errno == errno.EBADF:  # NFS locks a file for writing only if it is open for writing
            raise UserError(
                f"Cannot lock {path}: it belongs to another user, and its file system locks only files that may be "
                f"written. Make it writable for this user: chmod a+w {path}"
            ) from None
        if error.errno not in _NO_LOCKS:  # a file server that is gone, or a broken disk
            error.filename = str(path)
            raise
        raise UserError(
            f"Cannot lock {path}: its file system has no file locks ({error.strerror}). Without locks, two commands "
            "could change the same files. Use a file system with flock (Lustre: mount it with -o flock; NFS: start "
            "its lock service)."
        ) from None
