"""Stopping on request: a cluster that is about to take its nodes back says so by SIGTERM or SIGUSR1."""

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
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.util.files import write_file

logger = logging.getLogger(__name__)

_MARKER = "stopped"


@contextmanager
def leaving_at_once(folder: Path) -> Iterator[None]:
    """Around scoring, where each text that is done is on the disk: a job whose time is over has nothing to save.

    It hears SIGUSR1 alone: SIGTERM may also come because another rank has failed, and that is no good order.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        (folder / _MARKER).touch()
        raise SystemExit(REQUEUE)

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class StopRequest:
    """Hears SIGTERM and SIGUSR1, whichever rank they reach.

    `stopped` in the model's folder says that training ended early, in good order.
    """

    def __init__(self, group: ExpertGroup, folder: Path) -> None:
        self._group = group
        self._marker = folder / _MARKER
        self._heard = False
        if group.is_first:
            self._marker.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank has heard it. All ranks call this together, so that all stop after the same step."""
        if self._group.size == 1:
            return self._heard
        heard = torch.tensor(float(self._heard), device=self._group.device)
        dist.all_reduce(heard, dist.ReduceOp.MAX)
        return bool(heard)

    def leave(self, step: int) -> None:
        """End this process with the code that asks to be started again; the state after `step` steps has been saved."""
        if self._group.is_first:
            write_file(self._marker, f"{step}\n")
            logger.warning("asked to stop: saved the state after step %d", step)
        dist.barrier()
        raise SystemExit(REQUEUE)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
