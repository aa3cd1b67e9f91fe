"""Reads the next step's text while a GPU computes this one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

Read = Callable[[int, int], Tensor]


class ReadAhead:
    """Reads samples by `read(first, count)`, and those of the next call ahead of time in a thread.

    On a CPU nothing is read ahead, because every core computes. Samples for a GPU are in pinned memory, from which
    copies are asynchronous.
    """

    def __init__(self, read: Read, device: torch.device) -> None:
        self._read = read
        self._pins = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "read-ahead") if device.type != "cpu" else None
        self._next: tuple[int, int, Future[Tensor]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def read(self, first: int, count: int, *, then: int | None = None) -> Tensor:
        """Return `count` samples from index `first` on, and start to read the `count` samples from `then` on.

        An error of reading ahead is raised by the call that asks for these samples.
        """
        ready, self._next = self._next, None
        announced = ready is not None and ready[:2] == (first, count)
        samples = ready[2].result() if ready is not None and announced else self._pinned(first, count)
        if then is not None and self._thread is not None:
            self._next = then, count, self._thread.submit(self._pinned, then, count)
        return samples

    def _pinned(self, first: int, count: int) -> Tensor:
        samples = self._read(first, count)
        return samples.pin_memory() if self._pins else samples
