"""The state of the stages that train no model: preparing text and evaluating, from their files and SLURM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.run.slurm_jobs import TEXT
from btm_scale.run.slurm_notes import SlurmNotes, is_running
from btm_scale.run.stages import EVALUATE, PREPARE, prepare_stage
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
        _prepare_status(config, run, slurm, done=prepared),
        _status(
            EVALUATE,
            run,
            slurm,
            done=trained and is_newest(config, run, final),
            held=trained and is_held(run.forest_lock),
            may_fail=trained,  # a job whose text or models were lost since says nothing about the next one
        ),
    ]


def _prepare_status(config: RunConfig, run: RunDir, slurm: SlurmNotes, *, done: bool) -> StageStatus:
    """Return the state of preparing text, of which processes or tasks of an array may each prepare a domain."""
    tasks = {model.removeprefix(TEXT) for _, model in [*slurm.live, *slurm.logs] if model and model.startswith(TEXT)}
    rest = [name for name in config.all_domains if name not in tasks]
    whole_done = done or bool(tasks and is_prepared(config, run, rest))
    whole = _status(PREPARE, run, slurm, done=whole_done, held=is_held(run.prepare_lock), may_fail=True)
    if done or whole.state == "running":
        return whole
    parts = [_text_status(run, slurm, name) for name in config.all_domains]
    # A domain that is being prepared again may be the one that failed.
    if whole.state == "failed" and not any(part.state == "running" for part in parts):
        return whole
    for state in ("failed", "running"):
        of_state = [part for part in parts if part.state == state]
        if of_state:
            return replace(of_state[0], name=PREPARE, note="; ".join(part.note for part in of_state))
    return replace(whole, state="waiting", note=whole.note or "; ".join(part.note for part in parts if part.note))


def _text_status(run: RunDir, slurm: SlurmNotes, domain: str) -> StageStatus:
    done, held = run.fingerprint(domain).is_file(), is_held(run.domain_lock(domain))
    part = _status(prepare_stage(domain), run, slurm, done=done, held=held, may_fail=True, task=f"{TEXT}{domain}")
    return replace(part, note=f"{domain}: {part.note}" if part.note else domain * (part.state == "running"))


def _status(
    name: str, run: RunDir, slurm: SlurmNotes, *, done: bool, held: bool, may_fail: bool, task: str = ""
) -> StageStatus:
    """Return the state of a stage, or that of the `task` of an array that does a part of it."""
    entry = slurm.of_model(task) if task else slurm.entry(name)
    if entry is not None:
        return StageStatus(name, "running" if is_running(entry) else "waiting", str(entry))
    if done:
        return StageStatus(name, "done")
    if held:
        return StageStatus(name, "running")
    log = slurm.log_of_model(task) if task else slurm.log(name)
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
