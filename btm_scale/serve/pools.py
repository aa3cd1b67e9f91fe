"""Threads for work on requests that would hold up the event loop, with bounded queues."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from btm_scale.serve.work import Busy

Result = TypeVar("Result")


class Pool:
    """A few threads and a bounded queue: slow work in one pool does not delay work in another."""

    def __init__(self, name: str, threads: int, *, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = threading.Semaphore(threads + max_waiting)

    async def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return the result of a function that runs in a thread. Raises Busy if the queue is full.

        Work that still waits when its caller is cancelled never starts.
        """
        if not self._room.acquire(blocking=False):
            raise Busy
        try:
            work = self._threads.submit(function, *arguments)
        except BaseException:
            self._room.release()
            raise
        work.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(work)
