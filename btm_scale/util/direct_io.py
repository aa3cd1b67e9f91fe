"""Direct I/O: writing to a disk without a copy in the page cache, which takes longer than the disk for large files.

Only complete blocks are written directly, and only if their bytes begin at the border of a block in memory too.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes; most file systems and disks need multiples of this or of less
_MEMORY_SHARE = 10  # the kernel begins to write when a tenth of memory waits for the disk, so more is not kept anyway


def is_worthwhile(nbytes: int) -> bool:
    """Return whether an output of this size is better written directly: its writer then waits for the disk anyway."""
    return nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MEMORY_SHARE


def aligned(nbytes: int) -> np.ndarray:
    """Return uninitialized uint8 [nbytes] that begin at the border of a block in memory."""
    memory = np.empty(nbytes + BLOCK, "u1")
    start = -memory.ctypes.data % BLOCK
    return memory[start : start + nbytes]


def open_direct(path: Path) -> int | None:
    """Open a file to write directly to a disk of this host. Returns None if its file system has none, or cannot."""
    # Devices of number 0 are on a network or in memory, or keep checksums of what passes the page cache.
    if not hasattr(os, "O_DIRECT") or os.major(path.stat().st_dev) == 0:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at an offset."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def write_directly(direct: int, buffered: int, data: memoryview, offset: int) -> None:
    """Write as `write_at`: what can be written directly through `direct`, and the rest through `buffered`.

    Threads and processes may do so at once. They share the pages of incomplete blocks, which the kernel keeps.
    """
    head = min(-offset % BLOCK, len(data))
    stop = head + (len(data) - head) // BLOCK * BLOCK
    if stop > head and (np.frombuffer(data, "u1").ctypes.data + head) % BLOCK == 0:
        try:
            write_at(direct, data[head:stop], offset + head)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the disk has larger blocks
                raise
        else:
            write_at(buffered, data[:head], offset)
            write_at(buffered, data[stop:], offset + stop)
            return
    write_at(buffered, data, offset)
