"""Train the mixture of experts of runs as a launcher's rank would: `train_mixture.py SPEC.json`.

A spec is a list of [run folder, step at which the process kills itself, or null]. Each is trained in a new process; if
that one was killed, another one resumes it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from helpers.worlds import read_spec

from btm_scale.config.run import RunConfig
from btm_scale.launch.local import free_port
from btm_scale.run.worker import train_as_rank
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.metrics import Metrics


def train(root: str, killed_at: int | None) -> None:
    record = Metrics.record

    def dying(self: Metrics, step: int, *rest: Any, **named: Any) -> dict[str, float]:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return record(self, step, *rest, **named)

    Metrics.record = dying  # type: ignore[method-assign]
    run = RunDir(Path(root))
    train_as_rank(RunConfig.load(run.config), run, MOE)


def in_a_process(root: str, killed_at: int | None) -> int:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1"})
    child = os.fork()
    if child == 0:
        train(root, killed_at)
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for root, killed_at in read_spec():
        if killed_at is not None:
            assert in_a_process(root, killed_at) == -signal.SIGKILL
        assert in_a_process(root, None) == 0
