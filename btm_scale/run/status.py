"""The status of a run: its text, the progress of every model by its files and SLURM, and why groups failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.run.slurm import queue_notes
from btm_scale.run.state import is_done, progress, state_at_rest
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names
from btm_scale.train.progress import ACTIVE, ModelProgress
from btm_scale.util.locks import ModelLock
from btm_scale.util.rank_log import Failure, read_failure


def run_status(config: RunConfig, run: RunDir) -> list[ModelProgress]:
    """Return one row per model, in the run's order."""
    queue = queue_notes(run)
    states, notes = {}, {}
    for model in model_names(config):
        runs_in_slurm, note = queue.get(model, (False, ""))
        if is_done(config, run, model):
            states[model] = "done"
            continue
        if runs_in_slurm or ModelLock.is_held(run.train(model)):
            states[model] = "running"
        elif note:
            states[model] = "waiting"
        else:
            states[model] = state_at_rest(config, run, model)
            failure = read_failure(run.log(model))
            note = failure.error if failure is not None else ""
        notes[model] = note
    return [replace(row, note=notes.get(row.model) or row.note) for row in progress(config, run, states)]


def watch(
    config: RunConfig, run: RunDir, show: Callable[[list[ModelProgress]], None], *, seconds: float = 2.0
) -> list[ModelProgress]:
    """Call `show` with the rows every `seconds` until no model is running or queued; returns the last rows."""
    while True:
        rows = run_status(config, run)
        show(rows)
        if not any(row.state in ACTIVE or row.note.startswith("SLURM") for row in rows):
            return rows
        time.sleep(seconds)


def failures(rows: list[ModelProgress], run: RunDir) -> dict[str, Failure]:
    """Return the failure of each failed model."""
    recorded = {row.model: read_failure(run.log(row.model)) for row in rows if row.state == "failed"}
    return {model: failure for model, failure in recorded.items() if failure is not None}


def data_summary(run: RunDir, fingerprints: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """Return documents, tokens and bytes of every domain's splits, with skipped lines and duplicates."""
    summary = {}
    for name, fingerprint in fingerprints.items():
        summary[name] = {split: counts.model_dump() for split, counts in fingerprint.splits.items()} | {
            "skipped_lines": fingerprint.skipped_lines,
            "duplicates": fingerprint.duplicates,
        }
    return {"data": str(run.data), "domains": summary}
