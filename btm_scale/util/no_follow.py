"""Open a file of a run without following a link: another user may have planted one under the file's name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from btm_scale.errors import UserError


def open_no_follow(path: Path, flags: int, refusal: UserError) -> int:
    """Return the descriptor of a regular file, opened with `flags`.

    Raises `refusal` for a link, or for anything else that is not a file, and OSError.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise refusal from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refusal
    return descriptor
