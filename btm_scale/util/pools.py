"""Thread pools and process pools, chosen by these rules:

- Threads for work that waits for the disk, or spends its time in numpy or torch, which release the GIL.
- Forked processes for GIL-bound work. They start in milliseconds and share loaded modules. Only if no other Python
  thread runs: it may hold a lock that would stay locked in the forked process.
- Spawned processes if other threads run and the work is long compared with starting a worker, which takes seconds: a
  large merge, or workers that live for a complete stream, such as those that encode text.

Workers end with the process that started them, and a killed worker raises WorkerLost.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from btm_scale.errors import WorkerLost
from btm_scale.util.cores import visible_cores
from btm_scale.util.stop_signal import starting_without_signal

Item = TypeVar("Item")
Done = TypeVar("Done")

MOST = 8
_INTERRUPT_SECONDS = 1.0
CORES = min(MOST, visible_cores())

AT_LIMIT = (
    "{}. The limit on processes and threads of this user (ulimit -u) or container is reached, or memory is full. "
    "Completed work is kept: raise the limit or end other processes, and rerun the command."
)


def may_fork() -> bool:
    """Return whether no other Python thread runs, so that forking is safe."""
    return threading.active_count() == 1


def in_threads(do: Callable[[Item], Done], items: Sequence[Item], *, at_once: int | None = None) -> list[Done]:
    """Map `do` over items in a thread pool; the results keep the order of the items.

    By default one thread per core, and a single one in a worker of a pool. The first error is raised once all have
    ended.
    """
    if at_once is None:
        at_once = CORES if multiprocessing.parent_process() is None else 1
    if len(items) < 2 or at_once < 2:
        return [do(item) for item in items]
    with ThreadPoolExecutor(min(at_once, len(items))) as pool:
        return list(pool.map(do, items))


def in_processes(do: Callable[[Item], Done], items: Sequence[Item]) -> list[Done]:
    """Map `do` over items in a forked process pool (for GIL-bound work); items and results are pickled.

    Uses threads if forking is not safe, since spawned processes take longer to start than most such work.
    """
    if not may_fork() or len(items) < 2 or CORES < 2:
        return in_threads(do, items)
    with lost_workers_told(), process_pool(min(CORES, len(items)), forks=True) as pool:
        return list(pool.map(do, items))


def process_pool(
    workers: int, *, forks: bool, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of processes, forked or spawned, that call `initializer` first and end with this process.

    It raises WorkerLost if this user may start no more processes.
    """
    context = multiprocessing.get_context("fork" if forks else "spawn")
    with _limits_reported():
        return _Pool(workers, mp_context=context, initializer=_begin, initargs=(initializer, initargs))


class _Pool(ProcessPoolExecutor):
    """Workers that ignore a requested stop: they end with the process that started them."""

    def submit(self, *arguments: Any, **named: Any) -> Future[Any]:
        with starting_without_signal(), _limits_reported():  # a worker may start here
            try:
                return super().submit(*arguments, **named)
            except OSError:
                # No thread of the pool ends the workers that have started, and Python waits for them when it exits.
                for worker in list((self._processes or {}).values()):
                    worker.kill()
                raise


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """Raise WorkerLost, which explains the cause, if a worker of a process pool is killed."""
    try:
        yield
    except BrokenProcessPool:
        time.sleep(_INTERRUPT_SECONDS)  # Ctrl-C at a terminal ends the workers too, perhaps before it arrives here
        raise WorkerLost(
            "a worker process of this command was killed, most likely because the machine ran out of memory. "
            "Completed work is kept: free memory, and rerun the command."
        ) from None


@contextmanager
def _limits_reported() -> Iterator[None]:
    """Raise WorkerLost, which names the limits, if a process cannot be started."""
    try:
        yield
    except OSError as error:
        if not is_at_limit(error):
            raise
        raise WorkerLost(f"Cannot start a worker process: {AT_LIMIT.format(error.strerror)}") from None


def is_at_limit(error: OSError) -> bool:
    """Return whether a process could not start because of a limit on processes or memory."""
    return error.errno in (errno.EAGAIN, errno.ENOMEM)


def _begin(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # Ctrl-C at a terminal reaches workers too: no traceback of each. A script's background commands ignore it.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True, name="parent-watch").start()
    if initializer is not None:
        initializer(*initargs)


def _end_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
