"""A bar with the rate of a long merge, on a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge.plan import MergePlan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

SHOWN_AFTER = 3.0  # seconds
_EVERY = 1.0  # seconds


class Bar:
    """The bytes that all processes of a merge have recorded, on stderr if that is a terminal that shows the log.

    Short merges show none. The bar runs no thread, because a process with threads would not fork: the merging process
    calls `update` as often as it likes.
    """

    def __init__(self, outputs: Sequence[tuple[MergePlan, Path]]) -> None:
        self._outputs = outputs
        self._next = time.monotonic() + SHOWN_AFTER
        self._stack = ExitStack()
        self._shown: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def update(self) -> None:
        """Show the bar, or move it, if it is time."""
        if time.monotonic() < self._next:
            return
        if self._shown is None:
            self._shown = self._show()
        if self._shown is not None:
            progress, task = self._shown
            progress.update(task, completed=self.done(), refresh=True)
        self._next = time.monotonic() + (_EVERY if self._shown else float("inf"))

    @property
    def total(self) -> int:
        """Bytes of all outputs."""
        return sum(spec.nbytes for plan, _ in self._outputs for spec in plan.specs.values())

    def done(self) -> int:
        """Return the bytes that are recorded as completed."""
        return sum(
            (unit.stop - unit.start) * plan.specs[unit.name].dtype.itemsize
            for plan, partial in self._outputs
            for unit in journal.finished(partial)
        )

    def _show(self) -> tuple[Progress, TaskID] | None:
        if not logger.isEnabledFor(logging.INFO):
            return None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Rate

        console = Console(stderr=True)
        if not console.is_terminal:
            return None
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Rate(), TimeRemainingColumn())
        progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        task = progress.add_task("merging", total=self.total, completed=self.done())
        return self._stack.enter_context(progress), task
