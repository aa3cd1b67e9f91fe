"""The training progress of every model, as a table, as lines of a log or as JSON."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from btm_scale.errors import first_few
from btm_scale.report.fitting import Fitting
from btm_scale.report.summary import NOTHING
from btm_scale.train.progress import ACTIVE, ModelProgress, State
from btm_scale.util.terminal import printable

logger = logging.getLogger(__name__)

_LINE_SECONDS = 10.0
_STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "cyan",
    "saving": "cyan",
    "scoring": "cyan",
    "done": "green",
    "stopped": "yellow",
    "failed": "bold red",
}

Show = Callable[[Sequence[ModelProgress]], None]


# Columns between the model's name and its state: all of them, and fewer for a narrow terminal.
_COLUMNS = (("", "step", "loss", "tokens/s", "time left"), ("step", "loss", "tokens/s", "time left"), ("step", "loss"))


def progress_table(rows: Sequence[ModelProgress]) -> Group:
    """Return a row per model for a terminal of any width, and below it the notes on models that have not failed."""
    versions = tuple(_table(rows, columns) for columns in _COLUMNS)
    notes = [
        Text(printable(f"{row.model}: {row.note}")) for row in rows if row.note and row.state not in ("failed", "done")
    ]
    return Group(Fitting(versions), *notes)


def _table(rows: Sequence[ModelProgress], columns: Sequence[str]) -> Table:
    if any(row.dev_loss is not None for row in rows):
        at = columns.index("loss") + 1
        columns = [*columns[:at], "dev loss", *columns[at:]]
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", no_wrap=True, max_width=28 if len(columns) > 2 else 16, overflow="ellipsis")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in rows:
        cells: dict[str, Any] = {
            "": _bar(row),
            "step": f"{row.step:,}/{row.steps:,}",
            "loss": _loss(row.loss),
            "dev loss": _loss(row.dev_loss),
            "tokens/s": _speed(row),
            "time left": duration(row.seconds_left),
        }
        table.add_row(
            Text(printable(row.model)),
            *(cells[name] for name in columns),
            Text(row.state, style=_STYLES[row.state]),
            style="dim" if row.state == "waiting" else "",
        )
    return table


def _bar(row: ModelProgress) -> ProgressBar:
    full = {"done": "green", "failed": "red", "stopped": "yellow"}.get(row.state, "cyan")
    # A model that takes no step is complete once it is done.
    total, completed = (row.steps, row.step) if row.steps else (1, int(row.state == "done"))
    return ProgressBar(total=total, completed=completed, width=16, complete_style=full, finished_style=full)


def progress_line(rows: Sequence[ModelProgress]) -> str:
    """Return the same in one line, for a log: the models that are done, in progress, stopped or failed."""
    done = [row.model for row in rows if row.state == "done"]
    names = f" ({first_few(done, 'models')})" if done else ""
    parts = [f"training: {len(done)}/{len(rows)} done{names}"]
    for row in rows:
        if row.state in ACTIVE:
            loss = f" loss {_loss(row.loss)}" if row.loss is not None else ""
            loss += f" dev {_loss(row.dev_loss)}" if row.dev_loss is not None else ""
            speed = f" {_speed(row)} tokens/s" if row.tokens_per_second is not None else ""
            left = f", {duration(row.seconds_left)} left" if row.seconds_left is not None else ""
            state = f", {row.state}" if row.state != "running" else ""
            note = f", {row.note}" if row.note else ""
            parts.append(f"{row.model} {row.step}/{row.steps}{loss}{speed}{left}{state}{note}")
        elif row.state in ("failed", "stopped"):
            state = "FAILED" if row.state == "failed" else "stopped"
            parts.append(f"{row.model} {state} at {row.step}/{row.steps}" + (f": {row.note}" if row.note else ""))
    return printable(" | ".join(parts))


def duration(seconds: float | None) -> str:
    """Time to the second below an hour, to the minute above; a dash for what isn't known."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"


def _loss(loss: float | None) -> str:
    return NOTHING if loss is None else f"{loss:.3f}"


def _speed(row: ModelProgress) -> str:
    return NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"


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
    """The table once, on stdout, and the devices that have trained."""
    console = Console()
    console.print(progress_table(rows))
    devices = dict.fromkeys(f"{row.device} ({row.kernels} kernels)" for row in rows if row.device)
    if devices:
        console.print(Text(printable(f"trained on {', '.join(devices)}"), style="dim"))


def progress_as_json(rows: Sequence[ModelProgress]) -> dict[str, Any]:
    """The table as data."""
    return {"models": {row.model: {key: value for key, value in asdict(row).items() if key != "model"} for row in rows}}


def _lines() -> Show:
    """Return a function that logs the progress at most every 10 seconds and when it is final, and no line twice."""
    last, logged = -_LINE_SECONDS, ""

    def show(rows: Sequence[ModelProgress]) -> None:
        nonlocal last, logged
        states = {row.state for row in rows}
        finished = not states & ACTIVE and (states <= {"done", "failed"} or "stopped" in states)
        line = progress_line(rows)
        if line != logged and (finished or time.monotonic() - last >= _LINE_SECONDS):
            last, logged = time.monotonic(), line
            logger.info("%s", line)

    return show
