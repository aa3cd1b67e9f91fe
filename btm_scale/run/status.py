"""The status of a run: its text, the progress of every model by its files and SLURM, and why groups failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.run.slurm_notes import SlurmNotes, is_running, slurm_notes
from btm_scale.run.stage_status import StageStatus, last_line
from btm_scale.run.state import is_done, progress, state_at_rest
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names
from btm_scale.train.progress import ACTIVE, ModelProgress
from btm_scale.util.locks import ModelLock, is_held
from btm_scale.util.rank_log import Failure, read_failure


def run_status(config: RunConfig, run: RunDir, slurm: SlurmNotes | None = None) -> list[ModelProgress]:
    """Return one row per model, in the run's order."""
    slurm = slurm_notes(run) if slurm is None else slurm
    states, notes = {}, {}
    for model in model_names(config):
        entry = slurm.of_model(model)
        if is_done(config, run, model):
            states[model] = "done"
            continue
        note = "" if entry is None else str(entry)
        if (entry is not None and is_running(entry)) or ModelLock.is_held(run.train(model)):
            states[model] = "running"
        elif entry is not None:
            states[model] = "waiting"
        else:
            states[model] = state_at_rest(config, run, model)
            failure, log = read_failure(run.log(model)), slurm.log_of_model(model)
            if failure is not None and states[model] == "failed":
                note = failure.error
            elif states[model] == "waiting" and log is not None:  # its job ended before a rank could report anything
                states[model] = "failed"
                note = f"{last_line(log)} ({log})"
        notes[model] = note
    return [replace(row, note=notes.get(row.model) or row.note) for row in progress(config, run, states)]


def watch(
    config: RunConfig, run: RunDir, show: Callable[[list[ModelProgress]], None], *, seconds: float = 2.0
) -> list[ModelProgress]:
    """Call `show` with the rows every `seconds` until no model is running or queued; returns the last rows."""
    while True:
        rows = run_status(config, run)
        show(rows)
        if not any(_is_under_way(row) for row in rows):
            return rows
        time.sleep(seconds)


def _is_under_way(row: ModelProgress) -> bool:
    return row.state in ACTIVE or row.note.startswith("SLURM")


def failures(rows: list[ModelProgress], run: RunDir) -> dict[str, Failure]:
    """Return the failure of each failed model that a rank has recorded."""
    recorded = {row.model: read_failure(run.log(row.model)) for row in rows if row.state == "failed"}
    return {model: failure for model, failure in recorded.items() if failure is not None}


def problems(rows: Sequence[ModelProgress], stages: Sequence[StageStatus], run: RunDir, slurm: SlurmNotes) -> list[str]:
    """Return a sentence for everything that keeps the run from being completed by what runs or is queued now."""
    said = [f"{stage.name} failed: {stage.note}" for stage in stages if stage.state == "failed"]
    said += [f"{row.model} failed: {row.note}" for row in rows if row.state == "failed"]
    said += [
        f"{model or job} waits in SLURM for {entry.reason}, which does not change when other jobs end. Change "
        "launch.slurm, cancel the job, and rerun."
        for (job, model), entry in slurm.live.items()
        if entry.is_blocked
    ]
    unfinished = [row.model for row in rows if row.state != "done"]
    unfinished += [stage.name for stage in stages if stage.state != "done"]
    if unfinished and slurm.problem:
        said.append(slurm.problem)
    elif unfinished and not (said or slurm.live or is_held(run.run_lock)):
        active = any(_is_under_way(row) for row in rows) or any(stage.state == "running" for stage in stages)
        if not active:
            said.append(
                f"Nothing is running or queued, and {', '.join(unfinished)} "
                f"{'is' if len(unfinished) == 1 else 'are'} not done. Run the same command again to resume."
            )
    return said


def data_summary(run: RunDir, fingerprints: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """Return documents, tokens and bytes of every domain's splits, with skipped lines and duplicates."""
    summary = {}
    for name, fingerprint in fingerprints.items():
        summary[name] = {split: counts.model_dump() for split, counts in fingerprint.splits.items()} | {
            "skipped_lines": fingerprint.skipped_lines,
            "duplicates": fingerprint.duplicates,
        }
    return {"data": str(run.data), "domains": summary}
