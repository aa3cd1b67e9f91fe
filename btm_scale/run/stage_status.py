"""The state of the stages that train no model: preparing text and evaluating, from their files and SLURM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.run.slurm_jobs import EVALUATE, PREPARE
from btm_scale.run.slurm_notes import SlurmNotes, is_running
from btm_scale.run.state import is_done, is_newest, is_prepared
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names
from btm_scale.train.progress import State
from btm_scale.util.locks import is_held
from btm_scale.util.rank_log import read_failure, tail


@dataclass(frozen=True)
class StageStatus:
    """One stage: what it is waiting for or why it failed, and the log that says more."""

    name: str
    state: State
    note: str = ""
    log: Path | None = None


def stage_status(config: RunConfig, run: RunDir, slurm: SlurmNotes) -> list[StageStatus]:
    """Return the states of `prepare` and `evaluate`."""
    # `btm-scale evaluate` writes no page, and the job of a cluster does.
    final = run.report if slurm.is_used else run.results
    prepared = is_prepared(config, run)
    trained = all(is_done(config, run, model) for model in model_names(config))
    return [
        _status(PREPARE, run, slurm, done=prepared, held=is_held(run.prepare_lock), may_fail=True),
        _status(
            EVALUATE,
            run,
            slurm,
            done=trained and is_newest(config, run, final),
            held=trained and is_held(run.forest_lock),
            may_fail=trained,  # a job whose text or models were lost since says nothing about the next one
        ),
    ]


def _status(name: str, run: RunDir, slurm: SlurmNotes, *, done: bool, held: bool, may_fail: bool) -> StageStatus:
    entry = slurm.entry(name)
    if entry is not None:
        return StageStatus(name, "running" if is_running(entry) else "waiting", str(entry))
    if done:
        return StageStatus(name, "done")
    if held:
        return StageStatus(name, "running")
    log = slurm.log(name)
    records = [run.stage_log(name)] + [run.log("score")] * (name == EVALUATE)
    for record in records:
        failure = read_failure(record)
        if failure is not None and may_fail:
            path = log or (failure.log if failure.log.is_file() else None)
            return StageStatus(name, "failed", failure.error + (f" ({path})" if path else ""), path)
    if log is not None and may_fail:
        return StageStatus(name, "failed", f"{last_line(log)} ({log})", log)
    return StageStatus(name, "waiting")


def stages_as_json(stages: Sequence[StageStatus]) -> dict[str, Any]:
    """Return state, note and log of each stage that trains no model."""
    return {one.name: {"state": one.state, "note": one.note, "log": one.log and str(one.log)} for one in stages}


def last_line(log: Path) -> str:
    """Return the last line of a log that has text."""
    return next((line.strip() for line in reversed(tail(log)) if line.strip()), "its log is empty")
