"""How far each model's training is, from the end of its metrics.jsonl, as a table or as lines."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from btm_scale.report.measures import NOTHING
from btm_scale.run_dir import RunDir

State = Literal["waiting", "running", "done", "failed"]
_TAIL_BYTES = 8192
_RECENT_STEPS = 20
_STYLES: dict[State, str] = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}


@dataclass(frozen=True)
class ModelProgress:
    """Where one model's training stands; None for what isn't known yet. `loss` in nats a token."""

    model: str
    state: State
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    note: str = ""


def read_progress(run: RunDir, model: str, steps: int, *, state: State, note: str = "") -> ModelProgress:
    """Progress from the last few KB of the model's metrics; speeds are medians over the last 20 steps.

    A missing file, a last line that is still being written and lines that are not JSON count as not there.
    """
    rows = _last_rows(run.metrics(model))
    if not rows:
        return ModelProgress(model, state, 0, steps, None, None, None, note)
    step = int(rows[-1]["step"])
    left = _median(rows, "seconds")
    if left is not None:
        left *= max(0, steps - step)
    return ModelProgress(
        model=model,
        state=state,
        step=step,
        steps=steps,
        loss=rows[-1].get("loss"),
        tokens_per_second=_median(rows, "tokens_per_second"),
        seconds_left=left if state == "running" else None,
        note=note,
    )


def progress_table(rows: Sequence[ModelProgress]) -> Table:
    """A row a model, for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", no_wrap=True, max_width=28, overflow="ellipsis")
    table.add_column("", width=16)
    for name in ("step", "loss", "tokens/s", "time left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for row in rows:
        style = _STYLES[row.state]
        full = "green" if row.state == "done" else "red" if row.state == "failed" else "cyan"
        table.add_row(
            Text(row.model),
            ProgressBar(
                total=max(1, row.steps),
                completed=row.step,
                width=16,
                complete_style=full,
                finished_style=full,
            ),
            f"{row.step:,}/{row.steps:,}",
            _loss(row),
            _speed(row),
            duration(row.seconds_left),
            Text(row.state + (f": {row.note}" if row.note else ""), style=style),
            style="dim" if row.state == "waiting" else "",
        )
    return table


def progress_line(rows: Sequence[ModelProgress]) -> str:
    """The same in one line, for a log: only models that are running or have failed, and how many are done."""
    done = sum(row.state == "done" for row in rows)
    parts = [f"{done}/{len(rows)} done"]
    for row in rows:
        if row.state == "running":
            left = f", {duration(row.seconds_left)} left" if row.seconds_left is not None else ""
            note = f", {row.note}" if row.note else ""
            parts.append(f"{row.model} {row.step}/{row.steps} loss {_loss(row)} {_speed(row)} tokens/s{left}{note}")
        elif row.state == "failed":
            parts.append(f"{row.model} FAILED at {row.step}/{row.steps}" + (f": {row.note}" if row.note else ""))
    return " | ".join(parts)


def duration(seconds: float | None) -> str:
    """Time to the second below an hour, to the minute above; a dash for what isn't known."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours < 48 else f"{hours // 24}d {hours % 24:02d}h"


def _loss(row: ModelProgress) -> str:
    return NOTHING if row.loss is None else f"{row.loss:.3f}"


def _speed(row: ModelProgress) -> str:
    return NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return statistics.median(values) if values else None


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    # Without the last piece, which is empty or unfinished, and the first, which the cut may have torn.
    whole = lines[:-1] if size <= _TAIL_BYTES else lines[1:-1]
    rows = []
    for line in whole[-_RECENT_STEPS:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
