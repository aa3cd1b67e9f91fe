"""Stopping on request: a cluster sends SIGTERM or SIGUSR1 before it reclaims its nodes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from btm_scale.distributed.group import ExpertGroup
from btm_scale.launch.shutdown import REQUEUE, STOPPED
from btm_scale.util.files import write_file
from btm_scale.util.stop_signal import leave_if_requested

logger = logging.getLogger(__name__)


def forget_stop(folder: Path) -> None:
    """Remove the mark of a stopped training, once the model is complete."""
    (folder / STOPPED).unlink(missing_ok=True)


@contextmanager
def leaving_at_once(folder: Path) -> Iterator[None]:
    """Exit at once on SIGUSR1, for scoring: every scored text is on disk already, so there is nothing to save.

    SIGTERM keeps its handler: it may also mean that another rank has failed, which is not a requested stop.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        (folder / STOPPED).touch()
        raise SystemExit(REQUEUE)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        leave_if_requested()
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class StopRequest:
    """Listens for SIGTERM and SIGUSR1, whichever rank they reach.

    The file `stopped` in the model's folder marks training that ended early, but cleanly.
    """

    def __init__(self, group: ExpertGroup, folder: Path) -> None:
        self._group = group
        self._marker = folder / STOPPED
        self._requested = False
        leave_if_requested()
        if group.is_first:
            self._marker.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Return whether any rank has received a signal. All ranks call this together and stop after the same step."""
        if self._group.size == 1:
            return self._requested
        requested = torch.tensor(float(self._requested), device=self._group.device)
        dist.all_reduce(requested, dist.ReduceOp.MAX)
        return bool(requested)

    def leave(self, step: int) -> None:
        """Exit with the code that requests a restart, once the checkpoint after `step` steps is saved."""
        if self._group.is_first:
            write_file(self._marker, f"{step}\n")
            logger.warning("asked to stop: saved the state after step %d", step)
        dist.barrier()
        raise SystemExit(REQUEUE)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
