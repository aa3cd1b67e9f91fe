"""Temporary names with a random part, and what killed processes left under them.

A process keeps its temporary file or directory locked while it writes it. One that is not locked is abandoned, and the
next command that writes in that folder removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# `ablate` of earlier versions named its folder so.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.partial|\.ablation-\w{8}", re.DOTALL)
PARTIAL = ".partial"  # ends temporary names

_swept: set[tuple[int, str]] = set()  # process and folder; a fork sweeps anew


def new_partial_file(final: Path) -> tuple[Path, IO[bytes]]:
    """Make a temporary file beside `final`, locked until it is closed; returns its path too."""
    _sweep(final.parent)
    while True:
        path = _random_partial(final)
        file = path.open("xb")  # not tempfile: its files are readable by their owner only, and a run may be shared
        if _is_locked(file.fileno(), path):
            return path, file
        file.close()  # another process has just taken it for a leftover


@contextmanager
def new_partial_directory(final: Path) -> Iterator[Path]:
    """Make a temporary directory beside `final`, readable by this user alone and locked until the block ends.

    The caller renames or removes it.
    """
    _sweep(final.parent)
    while True:
        path = _random_partial(final)
        path.mkdir(mode=0o700)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # another process has just taken it for a leftover
            continue
        try:
            if _is_locked(descriptor, path):
                yield path
                return
        finally:
            os.close(descriptor)


@contextmanager
def scratch_directory(place: Path) -> Iterator[Path]:
    """Make a directory beside `place`, named after it, that is removed when the block ends, or after a kill later."""
    with new_partial_directory(place) as path:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _random_partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{PARTIAL}")


def _sweep(folder: Path) -> None:
    """Sweep a folder at the first write of this process there."""
    key = os.getpid(), str(folder)
    if key not in _swept:
        _swept.add(key)
        sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what killed processes of this user left in a folder under temporary names."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # absent, or not readable
        for name in [entry.name for entry in entries if _TEMPORARY.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    status = path.lstat()
    is_directory = stat.S_ISDIR(status.st_mode)
    if status.st_uid != os.geteuid() or not (is_directory or stat.S_ISREG(status.st_mode)):
        return
    flags = os.O_RDONLY | os.O_DIRECTORY if is_directory else os.O_RDWR
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if locked, or without support of locks
        if is_directory:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, path: Path) -> bool:
    """Lock what was just made; returns False if another process removes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, on which nothing counts as abandoned
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
