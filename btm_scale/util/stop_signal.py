"""SIGUSR1 as a request to stop, from the start of a command. Without a handler, the signal kills a process.

Imports next to nothing: a command's imports take seconds, during which a cluster may send the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

# A process that was asked to stop exits with it; a restart resumes its work.
EXIT_CODE = 85
_MESSAGE = b"btm-scale: asked to stop; rerun the same command to resume\n"

_is_requested = False


def leave_on_signal() -> None:
    """Let SIGUSR1 end this process with a message and `EXIT_CODE`, wherever its work has no handler for the signal."""
    signal.signal(signal.SIGUSR1, _leave)


def leave_if_requested() -> None:
    """Raise SystemExit again if the signal came while a library was imported that ignored the first one."""
    if _is_requested:
        raise SystemExit(EXIT_CODE)


@contextlib.contextmanager
def starting_without_signal() -> Iterator[None]:
    """Block SIGUSR1 in the processes that the block starts, since SLURM sends it to them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(number: int, frame: FrameType | None) -> None:
    global _is_requested
    if not _is_requested:
        _is_requested = True
        with contextlib.suppress(OSError):
            os.write(2, _MESSAGE)  # print fails if the signal has interrupted a print
    raise SystemExit(EXIT_CODE)
