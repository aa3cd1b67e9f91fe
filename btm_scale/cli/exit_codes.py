"""From what stops a verb to a message and an exit code: 2 for a user's mistake, 1 for any other failure."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator

from btm_scale.errors import GroupFailed, UserError, WorkerLost

# A full disk, or one that refuses this user, needs no traceback.
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Around a verb: end the process with a message for every error that a user can do something about."""
    try:
        yield
    except UserError as error:
        _end(error, 2)
    except (GroupFailed, WorkerLost) as error:
        _end(error, 1)
    except KeyboardInterrupt:
        _end("interrupted; rerun the same command to resume", 130)
    except BrokenPipeError:
        # Another pipe than stdout may be broken, such as a worker's.
        if not _stdout_is_closed():
            raise
        sys.exit(1)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _end(f"{error}. Completed work is kept; fix the problem and rerun to resume.", 1)


def _end(message: object, code: int) -> None:
    print(f"btm-scale: {message}", file=sys.stderr)
    sys.exit(code)


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout, such as `head`, has gone; what is still buffered is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
