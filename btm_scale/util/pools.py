"""A few things at a time, in threads or in processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import TypeVar

from btm_scale.errors import WorkerLost
from btm_scale.util.processes import end_with_parent

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 8
CORES = min(MOST, len(os.sched_getaffinity(0)))


def may_fork() -> bool:
    """Whether no other Python thread runs: it might hold a lock that no one would ever open in a forked process."""
    return threading.active_count() == 1


def in_threads(do: Callable[[Item], Done], items: Sequence[Item], *, at_once: int | None = None) -> list[Done]:
    """`do` of every item, in their order, where the work waits for the disk or is long loops of numpy's.

    By default as many at once as there are cores, and one in a worker of a pool. The first error is raised when all
    have ended.
    """
    if at_once is None:
        at_once = CORES if parent_process() is None else 1
    if len(items) < 2 or at_once < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(do, items))


def in_processes(do: Callable[[Item], Done], items: Sequence[Item]) -> list[Done]:
    """`do` of every item, in their order, where the work is the interpreter's; items and what is done are pickled.

    In threads, where it may not fork: another process takes longer to start than most work.
    """
    if not may_fork() or len(items) < 2 or CORES < 2:
        return in_threads(do, items)
    workers = min(CORES, len(items))
    with (
        lost_workers_told(),
        ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=end_with_parent) as pool,
    ):
        return list(pool.map(do, items))


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Around a pool of processes: one that was killed is an error that a user can read."""
    try:
        yield
    except BrokenProcessPool:
        raise WorkerLost(
            "a worker process of this command was killed, most likely because the machine has no memory left. "
            "Nothing that was done is lost: free memory, and run it again."
        ) from None
