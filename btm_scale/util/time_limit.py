"""A time limit for a call into a library that cannot be interrupted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# A call that waits instead of computing is given this many times its limit.
_WAITING = 20


def within(seconds: float, do: Callable[[], T]) -> T:
    """Return `do()`, which runs in a thread, or raise TimeoutError after `seconds` of CPU time of this process.

    CPU time, because a busy machine or a stopped process is not the call's fault. The call must release the GIL. One
    that is overdue keeps its thread until the process ends.
    """
    outcome: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def call() -> None:
        try:
            outcome.append(do())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    begun, last = time.process_time(), time.monotonic() + _WAITING * seconds
    threading.Thread(target=call, daemon=True, name="time-limit").start()
    while not done.wait(seconds):
        if time.process_time() - begun > seconds or time.monotonic() > last:
            raise TimeoutError
    if errors:
        raise errors[0]
    return outcome[0]
