"""The training progress of a model, from the end of its metrics.jsonl."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from btm_scale.run_dir import RunDir
from btm_scale.train.metrics import CROWDED, DEV_LOSS, metrics_row

State = Literal["waiting", "running", "saving", "scoring", "done", "stopped", "failed"]
ACTIVE: frozenset[State] = frozenset(["running", "saving", "scoring"])  # a group works on the model

_TAILS = (1 << 13, 1 << 17, 1 << 21)  # bytes
_DEV_TAIL_BYTES = 4 << 20
_RECENT_STEPS = 20


@dataclass(frozen=True)
class ModelProgress:
    """The training progress of one model; None for what is not known yet. `loss` is in nats per token."""

    model: str
    state: State
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    note: str = ""
    device: str | None = None
    kernels: str | None = None
    dev_loss: float | None = None  # the last that was measured, in nats per token


def read_progress(
    run: RunDir,
    model: str,
    steps: int,
    *,
    state: State,
    note: str = "",
    is_exported: bool = False,
    measured: bool = False,
) -> ModelProgress:
    """Return the progress from the last few KB of the model's metrics; speeds are medians over the last 20 steps.

    `measured`: the metrics have losses on dev text, the last of which may be further back. A model that is running is
    "saving" after its last step, and "scoring" once it `is_exported`. A missing file, an unfinished last line and lines
    that are not JSON are ignored.
    """
    rows = _last_rows(run.metrics(model))
    if state == "running" and is_exported:
        state = "scoring"
    if not rows:
        return ModelProgress(model, state, 0, steps, None, None, None, note)
    step = int(rows[-1]["step"])
    if state == "running" and step >= steps:
        state = "saving"
    waits = rows[-1].get("core_wait", 0.0)
    if state == "running" and not note and isinstance(waits, float) and waits > CROWDED:
        note = f"threads wait for a core {100 * waits:.0f}% of the time: other work uses the same cores"
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
        device=rows[-1].get("device"),
        kernels=rows[-1].get("kernels"),
        dev_loss=_last_dev_loss(run.metrics(model)) if measured else None,
    )


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return statistics.median(values) if values else None


def _last_dev_loss(path: Path) -> float | None:
    """Return the last loss on dev text, from the last few MB of the metrics."""
    mark = f'"{DEV_LOSS}":'.encode()
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _DEV_TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    rows = (metrics_row(line) for line in reversed(lines) if mark in line)
    return next((row[DEV_LOSS] for row in rows if row is not None and DEV_LOSS in row), None)


def _last_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            complete: list[bytes] = []
            for tail in _TAILS:  # some rows of a mixture of experts are long
                file.seek(max(0, size - tail))
                lines = file.read(tail).split(b"\n")
                # The last piece is empty or unfinished, and the first may be cut.
                complete = lines[:-1] if size <= tail else lines[1:-1]
                if len(complete) >= _RECENT_STEPS or size <= tail:
                    break
    except OSError:  # absent, or not readable now
        return []
    return [row for line in complete[-_RECENT_STEPS:] if (row := metrics_row(line)) is not None]
