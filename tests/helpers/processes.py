"""Processes that may end while a test looks at them, and waiting for what they do."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil


def wait_for(
    condition: Callable[[], bool],
    seconds: float = 600,
    process: subprocess.Popen[Any] | None = None,
    poll: float = 0.01,
) -> None:
    """Wait until `condition()` is true, which a process, if one is given, should make true before it ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            output = process.stderr or process.stdout
            raise AssertionError(f"the process ended too early: {output.read() if output else process.returncode}")
        assert time.monotonic() < deadline, f"not reached in {seconds} s"
        time.sleep(poll)


def command_line(process: psutil.Process) -> str:
    """Return a process's words, separated by spaces, or nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):  # as for a process that ended and has not been waited for
        return " ".join(process.cmdline())
    return ""


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that ended and has not been waited for does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
