"""Disk errors: how to recognize them, and how each gets to name a file, whichever library raises it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# Of a file server or a path, if they name a file; sockets and pipes have some of them too.
_OF_SERVERS = {
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOLCK,
}
_OF_PATHS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG}
_OF_LIMITS = {errno.EMFILE, errno.ENFILE}
_IN_RUST = re.compile(r"\(os error (\d+)\)")  # the end of error messages of libraries in Rust


def is_transient(error: OSError) -> bool:
    """Return whether a disk is full or broken, so that the same command may succeed later."""
    return error.errno in _TRANSIENT


def sentence(error: OSError) -> str | None:
    """Return the message for a disk that is full, is broken or refuses a user or path; None for any other error."""
    named = set() if error.filename is None else _OF_SERVERS | _OF_PATHS | _OF_LIMITS
    if error.errno not in _TRANSIENT | _REFUSED | named:
        return None
    remedy = "fix the problem"
    if error.errno in _OF_PATHS:
        remedy = "move what is in the way, or choose another path,"
    elif error.errno in _OF_LIMITS:
        remedy = "raise the limit (ulimit -n)"
    reason = f"{error.strerror}. Completed work is kept; {remedy} and rerun to resume."
    return reason if error.filename is None else f"Cannot use {os.fsdecode(error.filename)}: {reason}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert every disk error in the block to an OSError that names a file, by default `path`.

    A failed write names no file, and libraries in Rust raise their own exceptions.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = _errno_of(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _errno_of(error: Exception) -> int | None:
    """Return the errno behind a library's exception, or None."""
    if in_rust := _IN_RUST.search(str(error)):
        return int(in_rust[1])
    # torch.save fails a second time, with a RuntimeError, when it closes what it could not write.
    cause = error.__context__
    return cause.errno if type(error) is RuntimeError and isinstance(cause, OSError) else None
