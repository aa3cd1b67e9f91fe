"""Context managers around a command that kill it, or fail the disk, from a chosen event below a folder on."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btm_scale.util import pools
from helpers.disk_events import watch
from helpers.verb_cases import is_log

# What a disk that is full or broken fails at; `write` fails in every library, from the opening of a file on. Logs are
# still written: the message of a rank that cannot log is lost.
FAULTS = {"open": ("open", "os.mkdir"), "rename": ("os.rename",), "sync": ("sync",), "write": ("open",)}
_CALLS = {  # of seccomp, and of write, writev and pwrite64
    "x86_64": (317, 1, 20, 18),
    "aarch64": (277, 64, 66, 68),
}


@contextmanager
def counted(root: str, log: str) -> Iterator[None]:
    """Append one line with its kind and its path to the file `log` per event."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(event: str, path: str) -> None:
        os.write(descriptor, f"{event} {path}".replace("\n", " ").encode() + b"\n")

    watch(Path(root), note)
    yield


@contextmanager
def killed_at(root: str, number: int) -> Iterator[None]:
    """Kill the process that is about to do event `number`, counted from 0 in each process and those that forked it."""
    seen = iter(range(number))

    def count(event: str, path: str) -> None:
        if next(seen, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(Path(root), count)
    yield


def is_part_of(fault: str, event: str, path: str) -> bool:
    """Return whether a fault may happen at an event."""
    return event in FAULTS[fault] and not is_log(Path(path))


@contextmanager
def failing(root: str, fault: str, number: int, error: int) -> Iterator[None]:
    """Fail with an errno from event `number` of a fault on; what removes files still works."""
    seen = iter(range(number))

    def count(event: str, path: str) -> None:
        if is_part_of(fault, event, path) and next(seen, None) is None:
            if fault == "write":
                _refuse_writes(error)
            else:
                raise OSError(error, os.strerror(error), *path.split("\n")[:1])

    pools.CORES = 1  # the pipes of a pool are written like files
    watch(Path(root), count)
    yield


def _refuse_writes(error: int) -> None:
    """Let the kernel fail all writes of this process, but for standard output and standard error."""
    seccomp, write, writev, pwrite = _CALLS[platform.machine()]
    load, equal, greater, answer = 0x20, 0x15, 0x25, 0x06
    program = (
        (load, 0, 0, 0),  # the number of the system call
        (equal, 4, 0, pwrite),
        (equal, 1, 0, write),
        (equal, 0, 3, writev),
        (load, 0, 0, 16),  # its first argument, a descriptor
        (greater, 0, 1, 2),
        (answer, 0, 0, 0x0005_0000 | error),
        (answer, 0, 0, 0x7FFF_0000),
    )
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, all_threads = 38, 1, 1
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.syscall(seccomp, set_filter, all_threads, filter_):
        raise RuntimeError(f"The kernel refuses a filter of system calls: {os.strerror(ctypes.get_errno())}")
