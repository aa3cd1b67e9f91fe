"""Kill a run, with all of its ranks, at a step of one of its models."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from pathlib import Path

import psutil

from btm_scale.run_dir import RunDir
from helpers.held_training import HeldTraining
from helpers.processes import wait_for
from helpers.tiny_run import start_btm_scale


def steps_taken(run: RunDir, model: str) -> int:
    """Return the number of steps in a model's metrics."""
    return run.metrics(model).read_text().count("\n") if run.metrics(model).is_file() else 0


def kill_after(config: Path, run: RunDir, model: str, step: int) -> None:
    """Start the run and kill all its processes once the model has taken the step, which is not its last."""
    with tempfile.TemporaryDirectory() as folder, HeldTraining(Path(folder), {model: step + 1}) as held:
        process = start_btm_scale(
            "run", config, "--out", run.root, environment=held.environment, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: steps_taken(run, model) >= step, process=process)
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        process.wait(60)
        psutil.wait_procs(processes, timeout=60)
