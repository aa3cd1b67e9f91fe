"""What a process is about to do to the files below a folder: opens for writing, new and removed names, and syncs.

Python announces all but syncs to audit hooks. Forked processes inherit the hook. Writes of C++ and Rust libraries are
not announced; they happen between two events.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAMED = {  # audit events, with the places of their paths and directory descriptors
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Called with the event and its path, or the old and the new one on two lines. The operation raises what it raises.
Before = Callable[[str, str], None]


def watch(root: Path, before: Before, after_sync: Callable[[int], None] = lambda descriptor: None) -> None:
    """Call `before` ahead of every event below `root`, and `after_sync` after a sync, until the process ends.

    Nothing is really synced: no test cuts the power of the machine.
    """
    below = str(root)
    busy = threading.local()

    def announce(event: str, path: str) -> None:
        last = path.rpartition("\n")[2]
        if (last == below or last.startswith(below + "/")) and not getattr(busy, "now", False):
            busy.now = True
            try:
                before(event, path)
            finally:
                busy.now = False

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & _WRITES:
                announce("open", os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 (without following links)
        elif event in _NAMED:
            paths = [
                _absolute(arguments[path_at], -1 if folder_at is None else arguments[folder_at])
                for path_at, folder_at in _NAMED[event]
            ]
            announce(event, "\n".join(paths))

    def sync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        announce("sync", _absolute(number, -1))
        if not getattr(busy, "now", False):
            busy.now = True
            try:
                after_sync(number)
            finally:
                busy.now = False

    os.fsync = os.fdatasync = sync
    sys.addaudithook(hear)


def _absolute(path: Any, folder: int) -> str:
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    base = str(Path(f"/proc/self/fd/{folder}").readlink()) if folder is not None and folder >= 0 else ""
    return os.path.abspath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH100, PTH118
