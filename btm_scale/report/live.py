"""The live table on a terminal; elsewhere one plain line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live

from btm_scale.report.progress import ModelProgress, progress_line, progress_table

_LINE_SECONDS = 10.0

Show = Callable[[Sequence[ModelProgress]], None]


@contextlib.contextmanager
def live_table(*, quiet: bool) -> Iterator[Show]:
    """A function that shows every group's progress on stderr, for as long as the block lasts."""
    console = Console(stderr=True)
    if quiet:
        yield lambda rows: None
    elif not console.is_terminal:
        yield _lines()
    else:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda rows: live.update(progress_table(rows))


def print_progress(rows: Sequence[ModelProgress]) -> None:
    """The table once, on stdout."""
    Console().print(progress_table(rows))


def progress_as_json(rows: Sequence[ModelProgress]) -> dict[str, Any]:
    """The table as data."""
    return {"models": {row.model: {key: value for key, value in asdict(row).items() if key != "model"} for row in rows}}


def _lines() -> Show:
    last = -_LINE_SECONDS

    def show(rows: Sequence[ModelProgress]) -> None:
        nonlocal last
        finished = all(row.state in ("done", "failed") for row in rows)
        if finished or time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(progress_line(rows), file=sys.stderr, flush=True)

    return show
