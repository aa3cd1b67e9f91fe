"""Which training checkpoints of a model are kept, and which a job can resume from."""

from __future__ import annotations

import shutil
from collections.abc import Container
from pathlib import Path

from btm_scale.errors import CheckpointError
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.position import read_position, state_path, step_of


def kept_steps(job: TrainingJob, best: int | None) -> frozenset[int]:
    """Return the steps whose checkpoints are kept: the best and, with wsd, the last before the decay.

    A raised budget resumes from before the decay.
    """
    return frozenset(step for step in (job.stable_steps, best) if step is not None)


def remove_old_states(folder: Path, step: int, keep: int, kept: Container[int] = ()) -> None:
    """Delete the checkpoints up to `step` except for the `keep` newest and those after `kept` steps.

    What a killed process left of one is deleted too.
    """
    # A newer checkpoint was skipped as damaged; it must not displace a usable one.
    states = [path for path in folder.glob("step-*") if path <= state_path(folder, step)]
    for old in sorted(states)[:-keep]:
        if step_of(old) not in kept:
            shutil.rmtree(old)


def remove_other_decays(folder: Path, job: TrainingJob) -> None:
    """Delete the checkpoints of a decay that ends earlier than the job's: its budget was raised."""
    for path in folder.glob("step-*"):
        if not continues(path, job):
            shutil.rmtree(path)


def continues(path: Path, job: TrainingJob | None) -> bool:
    """Return whether a job can resume from a checkpoint, unless it is damaged."""
    if job is None or job.stable_steps is None:
        return True
    try:
        return read_position(path).decay_end in (None, job.steps)
    except CheckpointError:
        return True
