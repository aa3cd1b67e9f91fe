"""Processes that may end while a test looks at them."""

from __future__ import annotations

import contextlib

import psutil


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
