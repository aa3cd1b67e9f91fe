"""A few things at a time, in threads or in processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from btm_scale.process import end_with_parent

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 8
CORES = min(MOST, len(os.sched_getaffinity(0)))


def may_fork() -> bool:
    """Whether a forked process would find no lock taken that no one will ever open in it: no other thread runs."""
    return threading.active_count() == 1


def in_threads(do: Callable[[Item], Done], items: Sequence[Item], *, at_once: int = CORES) -> list[Done]:
    """`do` of every item, in their order, where the work waits for the disk or is long loops of numpy's.

    The first error is raised when all have ended.
    """
    if len(items) < 2 or at_once < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(do, items))


def in_processes(do: Callable[[Item], Done], items: Sequence[Item]) -> list[Done]:
    """`do` of every item, in their order, where the work is the interpreter's; items and what is done are pickled.

    In this process, where it may not fork: another one takes longer to start than most work.
    """
    if len(items) < 2 or CORES < 2 or not may_fork():
        return [do(item) for item in items]
    workers = min(CORES, len(items))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=end_with_parent) as pool:
        return list(pool.map(do, items))
