"""A few things at a time, where the work lets go of the interpreter: it waits for the disk, or is numpy's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 8
CORES = min(MOST, len(os.sched_getaffinity(0)))


def in_threads(do: Callable[[Item], Done], items: Sequence[Item], *, at_once: int = CORES) -> list[Done]:
    """`do` of every item, in their order; the first error is raised when all have ended."""
    if len(items) < 2 or at_once < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(do, items))
