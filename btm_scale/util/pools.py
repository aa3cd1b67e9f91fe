"""A few things at a time, in threads or in processes. Which of them is decided by these rules:

- Threads where the work waits for the disk, or is long loops of numpy's or torch's, which let other threads run.
- Forked processes where the work is the interpreter's. They start in milliseconds and share all that is loaded. Only
  where no other Python thread runs: it may hold a lock that would stay locked for ever in a forked process.
- Spawned processes where such threads run and starting anew, seconds a worker, is little beside the work: a large
  merge, or workers that stay for a whole stream, as those that encode text.

All processes end with the one that started them, and one that was killed is an error that says so.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from btm_scale.errors import WorkerLost

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 8
CORES = min(MOST, len(os.sched_getaffinity(0)))


def may_fork() -> bool:
    """Whether no other Python thread runs."""
    return threading.active_count() == 1


def in_threads(do: Callable[[Item], Done], items: Sequence[Item], *, at_once: int | None = None) -> list[Done]:
    """Return `do` of every item, in their order, worked out in threads.

    By default as many at once as there are cores, and one in a worker of a pool. The first error is raised when all
    have ended.
    """
    if at_once is None:
        at_once = CORES if multiprocessing.parent_process() is None else 1
    if len(items) < 2 or at_once < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(do, items))


def in_processes(do: Callable[[Item], Done], items: Sequence[Item]) -> list[Done]:
    """Return `do` of every item, in their order, worked out in forked processes; items and results are pickled.

    In threads where it may not fork: spawned processes take longer to start than most such work.
    """
    if not may_fork() or len(items) < 2 or CORES < 2:
        return in_threads(do, items)
    with lost_workers_told(), process_pool(min(CORES, len(items)), forks=True) as pool:
        return list(pool.map(do, items))


def process_pool(
    workers: int, *, forks: bool, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of processes, forked or spawned, that call `initializer` first and end with this process."""
    context = multiprocessing.get_context("fork" if forks else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(initializer, initargs))


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Around a pool of processes: one that was killed raises WorkerLost, which a user can read."""
    try:
        yield
    except BrokenProcessPool:
        raise WorkerLost(
            "a worker process of this command was killed, most likely because the machine has no memory left. "
            "Nothing that was done is lost: free memory, and run it again."
        ) from None


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True, name="parent-watch").start()
    if initializer is not None:
        initializer(*initargs)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
