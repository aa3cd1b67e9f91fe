"""The progress of preparing text as bars on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from btm_scale.data.progress import Progress as Show
from btm_scale.data.progress import logged_progress
from btm_scale.report.summary import shorten
from btm_scale.util.terminal import printable

_LONGEST_NAME = 24


@contextlib.contextmanager
def encoding_bars(*, quiet: bool, console: Console | None = None) -> Iterator[Show]:
    """Yield a function that shows a bar per domain on stderr, or logs lines if that is not a terminal."""
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield logged_progress()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[documents]} documents"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
            if domain not in tasks:
                complete()
                name = shorten(printable(domain), _LONGEST_NAME)
                tasks[domain] = bars.add_task(name, total=expected or None, documents="0")
            bars.update(tasks[domain], completed=encoded_bytes, documents=f"{documents:,}")

        def complete() -> None:
            for task in tasks.values():  # an estimate of its size may have been too high, or there was none
                bars.update(task, total=bars.tasks[task].completed)

        yield show
        complete()
